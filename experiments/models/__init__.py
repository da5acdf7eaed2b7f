"""The models of the experiments, each in Linen and NNX with the same params paths."""
