"""A finished model for others: exported, described, verified, sent to the Hub."""
