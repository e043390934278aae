"""From labelled structures to a trained student."""
