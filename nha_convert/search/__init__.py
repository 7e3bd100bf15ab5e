"""Which layers keep full attention, and which windows the others get: measured, then chosen."""
