"""What a converted model keeps of its teacher, measured: likelihood, agreement, branches, recall."""
