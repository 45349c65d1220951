"""Diff-vector transfer: move what fine-tuning did to a base model onto its successor."""
