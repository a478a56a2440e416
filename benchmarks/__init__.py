"""Speed and memory of the layers against what a user has without them: `pytest benchmarks/`.

`shapes` and `competitors` make the cases, `gate` checks a result before `timing` measures it, `ceilings`
says what the machine can; `records` are kept in the JSON, of which `tables`, `goals`, `plots` and
`report` are functions.
"""
