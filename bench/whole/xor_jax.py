"""XOR from nothing, as a user of JAX who knows how to be fast would write it: a scan over all steps. Prints the last loss."""

import jax
import jax.numpy as jnp
import numpy as np

x = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
y = np.array([0, 1, 1, 0], np.float32)
random = np.random.default_rng(0)
start = {
    "w1": random.normal(size=(2, 8)).astype(np.float32),
    "b1": np.zeros(8, np.float32),
    "w2": random.normal(size=8).astype(np.float32) / 8**0.5,
    "b2": np.float32(0),
}


def objective(p):
    """The mean loss."""
    s = jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
    return jnp.mean(jax.nn.softplus(s) - y * s)


def step(carry, t):
    """Adam."""
    p, m, v = carry
    loss, g = jax.value_and_grad(objective)(p)
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
    v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, g)
    c1, c2 = 1 - 0.9**t, 1 - 0.999**t
    return (jax.tree.map(lambda p, m, v: p - 0.05 * m / c1 / (jnp.sqrt(v / c2) + 1e-8), p, m, v), m, v), loss


zeros = jax.tree.map(np.zeros_like, start)
_, losses = jax.jit(lambda carry, t: jax.lax.scan(step, carry, t))((start, zeros, zeros), jnp.arange(1.0, 1001.0))
print(float(losses[-1]))
