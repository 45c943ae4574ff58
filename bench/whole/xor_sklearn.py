"""XOR from nothing, as a user of scikit-learn would write it. Prints the last loss."""

import warnings

import numpy as np
from sklearn.neural_network import MLPClassifier

warnings.simplefilter("ignore")  # that 1000 epochs may be too few
x = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
y = np.array([0, 1, 1, 0])
net = MLPClassifier(
    (8,), "tanh", alpha=0.0, batch_size=4, learning_rate_init=0.05, max_iter=1000, tol=0.0, n_iter_no_change=1000, random_state=0
)
net.fit(x, y)
print(net.loss_)
