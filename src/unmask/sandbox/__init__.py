"""Processes that judge untrusted text, so that the trainer need not."""
