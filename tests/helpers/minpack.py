"""Test problems of MINPACK as residuals in plain arithmetic, with starts and their least costs |r|^2 / 2.

J. J. More, B. S. Garbow, K. E. Hillstrom, Testing unconstrained optimization software, ACM Trans. Math. Software 7,
1981.
"""

import math

import torch

KOWALIK_Y = [0.1957, 0.1947, 0.1735, 0.16, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246]
KOWALIK_U = [4.0, 2.0, 1.0, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625]
BARD_Y = [0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.1, 4.39]
MEYER_Y = [34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744, 8261, 7030, 6005, 5147, 4427, 3820, 3307, 2872]
OSBORNE_Y = """.844 .908 .932 .936 .925 .908 .881 .85 .818 .784 .751 .718 .685 .658 .628 .603 .58 .558
    .538 .522 .506 .49 .478 .467 .457 .448 .438 .431 .424 .42 .414 .411 .406"""


def numbers(values):
    return torch.tensor([float(value) for value in (values.split() if isinstance(values, str) else values)]).double()


def _rosenbrock(x):
    return torch.stack([10.0 * (x[1] - x[0] ** 2), 1.0 - x[0]])


def _helical_valley(x):
    theta = torch.atan2(x[1], x[0]) / (2.0 * math.pi)
    radius = (x[0] ** 2 + x[1] ** 2).sqrt()
    return torch.stack([10.0 * (x[2] - 10.0 * theta), 10.0 * (radius - 1.0), x[2]])


def _powell_singular(x):
    r = [x[0] + 10 * x[1], 5**0.5 * (x[2] - x[3]), (x[1] - 2 * x[2]) ** 2, 10**0.5 * (x[0] - x[3]) ** 2]
    return torch.stack(r)


def _freudenstein_roth(x):
    return torch.stack([-13 + x[0] + ((5 - x[1]) * x[1] - 2) * x[1], -29 + x[0] + ((x[1] + 1) * x[1] - 14) * x[1]])


def _bard(x):
    u = torch.arange(1.0, 16.0).double()
    return numbers(BARD_Y) - (x[0] + u / (x[1] * (16.0 - u) + x[2] * torch.minimum(u, 16.0 - u)))


def _kowalik_osborne(x):
    u = numbers(KOWALIK_U)
    return numbers(KOWALIK_Y) - x[0] * (u**2 + x[1] * u) / (u**2 + x[2] * u + x[3])


def _meyer(x):
    return x[0] * torch.exp(x[1] / (45.0 + 5.0 * torch.arange(1.0, 17.0).double() + x[2])) - numbers(MEYER_Y)


def _beale(x):
    return torch.stack([c - x[0] * (1 - x[1] ** k) for k, c in ((1, 1.5), (2, 2.25), (3, 2.625))])


def _box(x):
    t = 0.1 * torch.arange(1.0, 11.0).double()
    return torch.exp(-t * x[0]) - torch.exp(-t * x[1]) - x[2] * (torch.exp(-t) - torch.exp(-10 * t))


def _brown_dennis(x):
    t = torch.arange(1.0, 21.0).double() / 5.0
    return (x[0] + t * x[1] - torch.exp(t)) ** 2 + (x[2] + x[3] * torch.sin(t) - torch.cos(t)) ** 2


def _osborne(x):
    t = 10.0 * torch.arange(33.0).double()
    return numbers(OSBORNE_Y) - (x[0] + x[1] * torch.exp(-t * x[3]) + x[2] * torch.exp(-t * x[4]))


def _wood(x):
    r = [10 * (x[1] - x[0] ** 2), 1 - x[0], 90**0.5 * (x[3] - x[2] ** 2), 1 - x[2], 10**0.5 * (x[1] + x[3] - 2)]
    return torch.stack([*r, (x[1] - x[3]) / 10**0.5])


def _jennrich_sampson(x):
    i = torch.arange(1.0, 11.0).double()
    return 2 + 2 * i - (torch.exp(i * x[0]) + torch.exp(i * x[1]))


#: Residuals and start.
PROBLEMS = {
    "Rosenbrock": (_rosenbrock, [-1.2, 1.0]),
    "helical valley": (_helical_valley, [-1.0, 0.0, 0.0]),
    "Powell singular": (_powell_singular, [3.0, -1.0, 0.0, 1.0]),
    "Freudenstein and Roth": (_freudenstein_roth, [0.5, -2.0]),
    "Bard": (_bard, [1.0, 1.0, 1.0]),
    "Kowalik and Osborne": (_kowalik_osborne, [0.25, 0.39, 0.415, 0.39]),
    "Meyer": (_meyer, [0.02, 4000.0, 250.0]),
    "Beale": (_beale, [1.0, 1.0]),
    "Box": (_box, [0.0, 10.0, 20.0]),
    "Brown and Dennis": (_brown_dennis, [25.0, 5.0, -5.0, -1.0]),
    "Osborne 1": (_osborne, [0.5, 1.5, -1.0, 0.01, 0.02]),
    "Wood": (_wood, [-3.0, -1.0, -3.0, -1.0]),
    "Jennrich and Sampson": (_jennrich_sampson, [0.3, 0.4]),
}
