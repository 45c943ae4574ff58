"""The benchmark: chainrule beside PyTorch, JAX and scikit-learn, on the same networks, weights and batches.

`python -m bench --help` says how to run it. To add a network, add a `Row` in `rows.py`; to add a library, a `Library` in
`libraries/__init__.py` and a module that keeps the contract written there.

    layers.py     kinds of layers, for all libraries alike: shapes, parameters, floating-point operations
    rows.py       the networks that are measured, with their data and initial weights
    libraries/    how each library trains such a network
    worker.py     the process in which a library lives
    pool.py       starting, asking and ending such processes
    peak.py       what the processor can do: its rate of multiply-adds
    measure.py    rounds of measurements, the agreement of losses, medians
    processes.py  whole processes from start to end
    compiling.py  compiling loops over time, short and long
    memory.py     backpropagation through time within a budget
    growth.py     forward against backward pass; widths and threads; time against parameters
    general.py    networks that nobody measured: odd shapes, layers written by hand
    results.py    what came out, as plain data
    tables.py     the same as text, Markdown, JSON
    __main__.py   the command line
"""
