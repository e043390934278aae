"""Trained students, one safetensors file each; `openmm_mlffd.modelfile` loads them."""
