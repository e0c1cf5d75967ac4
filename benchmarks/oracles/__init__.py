"""Each method once more, slow and dense, in float64 and in the words of its paper; a module a family, `ORACLES` by name.

The tests of a method hold it against its oracle, and `python -m benchmarks.methods` prints how well they agree.
"""
