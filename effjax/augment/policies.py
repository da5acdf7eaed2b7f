"""The policies that AutoAugment found, as published: tables 7 to 9 of the paper's appendix.

Each policy has 25 sub-policies of two operations: a name, a probability and a magnitude 0 .. 9. An
operation without a magnitude has 0 here.

Reference: Cubuk et al., "AutoAugment: learning augmentation strategies from data", 2018,
https://arxiv.org/abs/1805.09501.
"""

Step = tuple[str, float, int]

CIFAR10: tuple[tuple[Step, Step], ...] = (
    (("invert", 0.1, 0), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, 0), ("equalise", 0.9, 0)),
    (("shear_y", 0.2, 7), ("posterise", 0.3, 7)),
    (("colour", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalise", 0.6, 0), ("equalise", 0.5, 0)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("colour", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalise", 0.3, 0), ("autocontrast", 0.4, 0)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("colour", 0.2, 8)),
    (("solarise", 0.5, 2), ("invert", 0.0, 0)),
    (("equalise", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalise", 0.2, 0), ("equalise", 0.6, 0)),
    (("colour", 0.9, 9), ("equalise", 0.6, 0)),
    (("autocontrast", 0.8, 0), ("solarise", 0.2, 8)),
    (("brightness", 0.1, 3), ("colour", 0.7, 0)),
    (("solarise", 0.4, 5), ("autocontrast", 0.9, 0)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, 0), ("solarise", 0.8, 3)),
    (("equalise", 0.8, 0), ("invert", 0.1, 0)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, 0)),
)

SVHN: tuple[tuple[Step, Step], ...] = (
    (("shear_x", 0.9, 4), ("invert", 0.2, 0)),
    (("shear_y", 0.9, 8), ("invert", 0.7, 0)),
    (("equalise", 0.6, 0), ("solarise", 0.6, 6)),
    (("invert", 0.9, 0), ("equalise", 0.6, 0)),
    (("equalise", 0.6, 0), ("rotate", 0.9, 3)),
    (("shear_x", 0.9, 4), ("autocontrast", 0.8, 0)),
    (("shear_y", 0.9, 8), ("invert", 0.4, 0)),
    (("shear_y", 0.9, 5), ("solarise", 0.2, 6)),
    (("invert", 0.9, 0), ("autocontrast", 0.8, 0)),
    (("equalise", 0.6, 0), ("rotate", 0.9, 3)),
    (("shear_x", 0.9, 4), ("solarise", 0.3, 3)),
    (("shear_y", 0.8, 8), ("invert", 0.7, 0)),
    (("equalise", 0.9, 0), ("translate_y", 0.6, 6)),
    (("invert", 0.9, 0), ("equalise", 0.6, 0)),
    (("contrast", 0.3, 3), ("rotate", 0.8, 4)),
    (("invert", 0.8, 0), ("translate_y", 0.0, 2)),
    (("shear_y", 0.7, 6), ("solarise", 0.4, 8)),
    (("invert", 0.6, 0), ("rotate", 0.8, 4)),
    (("shear_y", 0.3, 7), ("translate_x", 0.9, 3)),
    (("shear_x", 0.1, 6), ("invert", 0.6, 0)),
    (("solarise", 0.7, 2), ("translate_y", 0.6, 7)),
    (("shear_y", 0.8, 4), ("invert", 0.8, 0)),
    (("shear_x", 0.7, 9), ("translate_y", 0.8, 3)),
    (("shear_y", 0.8, 5), ("autocontrast", 0.7, 0)),
    (("shear_x", 0.7, 2), ("invert", 0.1, 0)),
)

IMAGENET: tuple[tuple[Step, Step], ...] = (
    (("posterise", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarise", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("equalise", 0.8, 0), ("equalise", 0.6, 0)),
    (("posterise", 0.6, 7), ("posterise", 0.6, 6)),
    (("equalise", 0.4, 0), ("solarise", 0.2, 4)),
    (("equalise", 0.4, 0), ("rotate", 0.8, 8)),
    (("solarise", 0.6, 3), ("equalise", 0.6, 0)),
    (("posterise", 0.8, 5), ("equalise", 1.0, 0)),
    (("rotate", 0.2, 3), ("solarise", 0.6, 8)),
    (("equalise", 0.6, 0), ("posterise", 0.4, 6)),
    (("rotate", 0.8, 8), ("colour", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalise", 0.6, 0)),
    (("equalise", 0.0, 0), ("equalise", 0.8, 0)),
    (("invert", 0.6, 0), ("equalise", 1.0, 0)),
    (("colour", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("colour", 1.0, 2)),
    (("colour", 0.8, 8), ("solarise", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 0)),
    (("shear_x", 0.6, 5), ("equalise", 1.0, 0)),
    (("colour", 0.4, 0), ("equalise", 0.6, 0)),
    (("equalise", 0.4, 0), ("solarise", 0.2, 4)),
    (("solarise", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("invert", 0.6, 0), ("equalise", 1.0, 0)),
    (("colour", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalise", 0.8, 0), ("equalise", 0.6, 0)),
)

POLICIES = {"cifar10": CIFAR10, "svhn": SVHN, "imagenet": IMAGENET}
