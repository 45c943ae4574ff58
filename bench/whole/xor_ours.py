"""XOR from nothing, as a user of chainrule would write it. Arguments: the backend. Prints the last loss."""

import sys

import numpy as np

import chainrule as cr
from chainrule import nn

x = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
y = np.array([0, 1, 1, 0])
net = nn.Sequential(nn.Dense(8, "tanh"), nn.Dense(1))
run = net.fit(
    x, y, loss="binary_cross_entropy", optimizer=cr.Adam(0.05), epochs=1000, batch_size=4, backend=sys.argv[1], verbose=False
)
print(run.loss[-1])
