"""The openmmml entry point. Imports nothing: openmmml loads this file before it is itself ready."""


class MLFFDPotentialImplFactory:
    """Makes the OpenMM implementation of a student; has the methods of `MLPotentialImplFactory`."""

    def createImpl(self, name: str, **args):
        """Make the implementation; see `MLFFDPotentialImpl` for the arguments."""
        from openmm_mlffd.interfaces.openmm_potential import MLFFDPotentialImpl

        return MLFFDPotentialImpl(name, **args)
