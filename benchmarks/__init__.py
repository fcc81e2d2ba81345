"""Speed, paired: every candidate of a table runs in the same process, interleaved with the others and with a plain copy."""
