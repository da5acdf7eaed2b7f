"""What every experiment stands on: data, batches, run folders, the training loop, the command line.

Import what is needed from its module:

| module | for |
|---|---|
| `data` | `load("digits")`: real data, hash-checked, with a validation split |
| `batches` | `Batches`: the batch as a function of seed and step; `evaluator` |
| `runs` | `open_run(name, config)`: the folder of a run, found again when it is started again |
| `loop` | `fit(run, step, state, batches, steps=...)`: train, log, evaluate, checkpoint, resume |
| `config` | `check(config, sparsity=(0, 1))`: bounds of a Config's fields |
| `provenance` | `provenance()`, `write_json` |
| `reporting` | `report(runs, out)`: finished runs as tables, figures and a page |
| `summaries` | what a summary.json holds, so that it can be reported on |
| `cli` | `python -m experiments` |
"""
