"""Write a randomly initialised checkpoint of an Orb model, run by a Python with orb-models."""

import sys

import torch
from orb_models.forcefield import pretrained

name, path = sys.argv[1:]
torch.manual_seed(0)
made = {}


def keep(model, *_, **__):
    made["model"] = model
    return model


# the function of that name puts the model together, then has its weights loaded
pretrained.load_model = keep
pretrained.ORB_PRETRAINED_MODELS[name](device="cpu", compile=False)
torch.save(made["model"].state_dict(), path)
