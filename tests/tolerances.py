"""Every tolerance of the test suite, with the reason for its size. Never widened in place: a test that needs more
room gets a line of its own here, with what was measured.

Use: `from tests.tolerances import TWIN` and `np.testing.assert_allclose(fast, slow, **TWIN)`.
"""

from __future__ import annotations

# A fast path beside its slow twin, both float32: sums in another order, a few hundred terms.
TWIN = dict(rtol=1e-5, atol=1e-5)

# The same for gradients: a second pass over the same sums, and products of two rounded values.
TWIN_GRAD = dict(rtol=1e-4, atol=1e-4)

# A slow twin written in float64 numpy beside float32 code: the float32 side's own rounding through a few layers.
ORACLE = dict(rtol=1e-4, atol=2e-5)

# Full RoPE layers ten million tokens out, beside float64: angles are right to 5e-5, and are multiplied on.
FAR = dict(rtol=0.0, atol=2e-4)

# RoPE's angles at any int32 position, in rad: six products of a digit below 64 and an angle rounded to 1e-7.
ANGLE = dict(rtol=0.0, atol=5e-5)

# Goldens from another implementation: whole models in float32. Its own noise against float64 is at most 1e-5, and
# the weakest feature that they must notice moves them by 3.6e-3.
GOLDEN = dict(rtol=0.0, atol=1e-4)

# Loss and gradients of the same batch on another mesh, or in another split: reductions in another order.
MESH_LOSS = dict(rtol=1e-5, atol=1e-6)
MESH_GRAD = dict(rtol=1e-3, atol=1e-5)

# Adapters folded into their matrices once, on a device or in numpy, beside folded where each layer runs: the matrices,
# and log-probabilities of tokens through a few layers.
FOLDED = dict(rtol=1e-5, atol=1e-5)

# bfloat16 beside float32: eight bits of mantissa.
BF16 = dict(rtol=2e-2, atol=2e-2)

# ||difference|| / ||gradient|| of the whole model, bfloat16 beside float32: rounding, and tokens that change expert.
BF16_GRADIENT = 0.1

# Twenty training steps on another mesh: the rounding of each step goes into the next.
MESH_CURVE = dict(rtol=2e-4)

# A golden loss curve, twenty steps on the same platform: drift between library versions.
CURVE = dict(rtol=2e-3, atol=2e-3)

# Twenty steps with AdamW's moments resting in bfloat16, beside float32, on a batch learnt by heart: 1.3e-3 was seen.
MOMENTS_CURVE = dict(rtol=5e-3)

# ||difference|| / ||gradient|| of one parameter, the whole model's gradient on a mesh beside one device, float32.
MESH_PARAMETER = 1e-4

# The same batch split, padded, packed or ordered in another way, on one mesh or several: a few units in the last place
# of the loss, and ||difference|| / ||gradient|| of every parameter.
SPLIT_LOSS = dict(rtol=1e-6)
SPLIT_PARAMETER = 1e-5

# Peak bytes, FLOPs and bytes sent of a step, estimated from formulas, beside its compiler's, at true size.
ESTIMATE = 0.15

# Losses that compare answers beside TRL's, in float64, in float32, and in float64 where TRL rounds to float32 on the
# way (8e-8 was seen).
TRL_64 = dict(rtol=1e-10, atol=1e-12)
TRL_32 = dict(rtol=1e-5, atol=1e-6)
TRL_ROUNDED = dict(rtol=1e-6, atol=1e-8)

# The same losses beside a slow twin of one answer at a time, in float64: values and gradients of a few sums, and slopes
# by central differences of 1e-5.
PREFERENCE_64 = dict(rtol=1e-10, atol=1e-11)
PREFERENCE_SLOPE = dict(rtol=1e-6, atol=1e-7)

# A reference's log-probability of a token: from disk and live, in other packings, on other meshes. What the issue of a
# trained model asks for; float32 sums of a few thousand terms.
CACHED_LOGP = dict(rtol=0.0, atol=1e-5)
