"""What chainrule takes besides the work: importing it, compiling the MNIST network, calls. Arguments: the backend, threads. Prints
the seconds as JSON."""

import json
import sys
from statistics import median
from time import perf_counter


def importing():
    """Seconds of it, with NumPy's part."""
    begun = perf_counter()
    import chainrule  # noqa: F401  # to import it is what is timed

    return perf_counter() - begun


def compiling(backend, threads):
    """How much longer than the next ones the first epoch of a network takes, in a process that has compiled another one."""
    import numpy as np

    from chainrule import nn, optim

    options = {"loss": "cross_entropy", "batch_size": 128, "backend": backend, "threads": threads, "verbose": False}
    x, y = np.ones((256, 784), np.float32), np.arange(256) % 10
    nn.Sequential(nn.Dense(10)).fit(x, y, epochs=1, optimizer=optim.SGD(0.1), **options)
    net = nn.Sequential(nn.Dense(256, "relu"), nn.Dense(128, "relu"), nn.Dense(10))
    net.fit(x, y, epochs=0, **options)
    times = []
    for _ in range(4):
        begun = perf_counter()
        net.fit(x, y, epochs=1, optimizer=optim.Adam(1e-3), **options)
        times.append(perf_counter() - begun)
    return times[0] - median(times[1:])


def call(f, *args, **kwargs):
    """Seconds of one, the median of many."""
    f(*args, **kwargs)
    each = []
    for _ in range(15):
        begun = perf_counter()
        for _ in range(500):
            f(*args, **kwargs)
        each.append((perf_counter() - begun) / 500)
    return median(each)


def calls():
    """Seconds of functions that have next to nothing to do."""
    import numpy as np

    import chainrule as cr

    a = np.ones(8)
    return {
        "array": call(cr.compile(lambda a: a * 2), a),
        "gradient": call(cr.compile(cr.value_and_grad(lambda a: np.sum(a * a))), a),
        "keyword": call(cr.compile(lambda a, n: a * n), a, n=3),
        "nest": call(cr.compile(lambda p, a: p["w"] * a + p["b"]), {"w": a, "b": a}, a),
    }


imported = importing()
print(json.dumps({"import": imported, "compiling": compiling(sys.argv[1], int(sys.argv[2])), **calls()}))
