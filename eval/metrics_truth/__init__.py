"""The metrics tried against the truth: `python eval/metrics_against_truth.py`."""
