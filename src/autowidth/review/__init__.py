"""One review of the widths of a network: look, judge, decide, try, commit.

batches.py, state.py, profit.py < reconstruct.py < statistics.py, calibrate.py, trial.py < review.py.
"""
