"""Files of weights: what they claim, checked; tensors moved from file to file."""
