"""Measures compressed models and judges them against baselines. `pytest bench` runs the `test_*` modules here.

session     how pytest drives a run            metrics     what each number is
data        what models are measured on        results     rows, items, layers, and their journal
reference   the shipped small model            statistics  paired tests, changes of timings and levels
measure     how measurements are made          gate        pass or fail, against baselines
machine     where a run took place             report      tables, charts, recommendations
commands    `python -m bench ...`
"""
