"""What must not move unless somebody means to move it: numbers, bits, files, help texts, the schema, public names.

`test_numbers.py` works with tiny models in one process and in two. Results of float64 models are compared with frozen checksums
to `work.TOLERANCE`, on any machine; results and shards of float32 models are hashed, and compared where hashes were frozen with
the same processor and libraries (elsewhere that test is skipped: freeze there before a change, and compare after it).
`test_interface.py` compares what users type and read; `tests/pipeline/test_run.py` the list of files of a run.

After a change that is meant, freeze anew, in one process and only what changed, and say why in the commit:

    pytest tests/guards --freeze -k "numbers and score"     # rewrites these lines of frozen.json
    pytest tests/guards --freeze -k help                    # rewrites help/*.txt
    pytest tests/pipeline --freeze -k leaves_all_files      # rewrites files.txt
"""
