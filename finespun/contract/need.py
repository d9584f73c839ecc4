"""What a method needs of a run, in words that everything else is derived from."""

from enum import StrEnum


class Need(StrEnum):
    """What a method needs of a run or of the structure beside it. Services are kept for it, slots
    are opened, and recipes refuse what does not go together."""

    PYTHON = "a call from Python between adapt and training"
    GRADIENTS = "gradients"  # of the base weights, before training
    ACTIVATIONS = "activations"  # mean |h| of the base, before training
    COVARIANCE = "covariance"  # of the layers' inputs, before training
    MEANS = "means"  # of the layers' inputs, before training
    LOSS = "loss of the first rows"  # as often as it is asked for, before training
    UPDATES = "updates of another adapter"  # in the folder that the value names
    WEIGHTS = "weights before quantisation"  # in the folder that the value names
    HELD_OUT = "held-out batches"
    PRODUCTS = "products"  # updates that are bilinear in their parameters
    FACTORS = "factors"  # updates with A and B
    SIDES = "two sides"  # A and B that are trained each by itself, so that a start can set them
    GATES = "gates"  # a gate on every rank
    GAIN = "gain"
    OVERLAY = "overlay"
    MIXER = "mixer"
    PERTURBATION = "perturbation"  # other parameters between forward and step
    HOLD = "hold"  # parameters that stand still for a step
    REPLAY = "replay"  # a second pass over a step's micro-batches
    ROOT_LOSS = "root loss"  # a loss that the model itself returns, or driver.loss
    TEACHER = "teacher"
    STEPPER = "stepper"  # an optimiser of its own


# What is measured of the base before training, and what a structure has or has not.
MEASURED = frozenset(
    {
        Need.GRADIENTS,
        Need.ACTIVATIONS,
        Need.COVARIANCE,
        Need.MEANS,
        Need.LOSS,
        Need.UPDATES,
        Need.WEIGHTS,
    }
)
OFFERED = frozenset({Need.PRODUCTS, Need.FACTORS, Need.SIDES, Need.GATES})
# What a run has one of.
SINGLE = frozenset({Need.STEPPER, Need.MIXER})
