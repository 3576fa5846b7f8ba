"""Theorem 1 of π-Flow as an algorithm (paper, 3.2 and E): a mixture whose velocity passes through given ones.

At pairwise distinct times t_n, n = 1 … N, let u_n be the velocities wanted at the states x_n in R^C. The prior
Σ_k A_k δ(x_0 - μ_k) has them where its posterior means are m_n = x_n - t_n u_n, that is (Eq. 7)

    Σ_k A_k K_n(μ_k) (μ_k - m_n) = 0,    K_n(μ) = exp(-‖x_n - α_n μ‖² / 2σ_n²),    A_k > 0,

N·C equations, linear in A. They are solved in four steps.

    programme      The weights of many candidate points that violate the equations least; the duals tell where another
                   point would help. Each time's rows are scaled by its largest kernel, and Σ_k A_k K_n(μ_k) is held
                   above 1 in these units: a time without weight would agree with everything, in rounding only.
    Carathéodory   N·C equations and a normalisation need N·C + 1 points; more are left out one by one. (The paper
                   counts N·C here, without the normalisation; the next step makes its count good.)
    Fenchel-Bunt   One of the N·C + 1 points moves to another. The weights that solve the equations follow, from all
                   positive to a pair of opposite sign; where the first of them is 0, N·C points are left.
    Gauss-Newton   Points and log-weights take out what rounding and the programme's tolerance have left.

Kernels are held as logarithms, and as all of it is linear in A, each point's weight has a unit of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pitools.mixture import GaussianMixture, all_finite
from pitools.path import as_time, x0_from_velocity

RADII = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Distances of the first candidates from m_n, in widths of the kernel at t_n."""
FAR = tuple(2.0 ** (i / 2) for i in range(-10, 14))
"""Distances of those among which the duals choose."""
SCALINGS = 5
"""Most scales of the kernels that are tried."""
ROUNDS = 20
"""Most programmes that are solved at each."""
SOLVED = 1e-7
"""Violation below which a programme is solved."""
NEGLIGIBLE = 1e-12
"""Weight that counts at no time."""
WAYS = 32
"""Most pairs of points between which one is moved."""
STOPS, HALVINGS = 16, 48
"""Stops on the way at which the sign of the weights is looked at, and halvings of the one where it changes."""
STEPS = 40
"""Most Gauss-Newton steps; where few do not suffice, the velocities are rough."""
RANK = 1e-11
"""Singular value, relative to the largest, below which a step leaves a direction alone."""
ROUNDED = 1e-12
"""Residual that is as good as none."""
SLOW = 1e-3
"""Velocities smaller than this are measured against it; noise has deviation 1."""


class InfeasibleError(ValueError):
    """No mixture was found.

    index: the row whose velocity is missed most.  error: by how much of its size.
    """

    def __init__(self, message: str, index: int, error: float) -> None:
        super().__init__(message)
        self.index = index
        self.error = error


@dataclass(frozen=True, eq=False)
class Realisation:
    """A mixture through N states and velocities in R^C.

    mixture: K points, a prior over data: means `[K, C]`, variance 0, float64.
    residual: the largest ‖u - u_n‖ / ‖u_n‖ of its own velocities u.
    reduced: whether K <= N·C; K = N·C + 1 if not.
    """

    mixture: GaussianMixture
    residual: float
    reduced: bool

    @property
    def atoms(self) -> int:
        """K."""
        return self.mixture.components

    def narrow(self, std: float) -> GaussianMixture:
        """The points as Gaussians of deviation `std`, whose velocities tend to theirs as std² does to 0 (Eq. 20).

        Raises `ValueError` unless std is finite and not negative.
        """
        if not 0 <= std < torch.inf:
            raise ValueError(f"std must be finite and not negative, got {std}")
        return GaussianMixture(self.mixture.means, self.mixture.log_weights, std**2)


def mixture_through(x_t: Tensor, velocity: Tensor, t: Tensor, tolerance: float = 1e-6) -> Realisation:
    """A mixture of at most N·C + 1 points that has these velocities, N·C where the reduction succeeds (Theorem 1).

    x_t, velocity: `[N, C]`.  t: `[N]` in (0, 1], pairwise distinct, in any order.  tolerance: the largest residual
    that is accepted. A velocity smaller than 10⁻³ is measured against 10⁻³: noise has deviation 1.
    Nothing is drawn at random, and nothing carries a gradient. The mixture is a prior over data; the policy from
    (x_src, t_src) is the `GMPolicy` of its `condition(x_src, t_src)`.

    The theorem promises a mixture for any velocities. A smooth teacher's have one close by; where velocities jump from
    one time to the next by many times the noise, weights differ by so many orders that the search may end before it.
    Raises `InfeasibleError`, a `ValueError`, where none is found within the tolerance, and `ValueError` for shapes that
    do not match, values that are not finite, times out of range or equal.
    """
    request = _Request.of(x_t, velocity, t)
    bound = request.x.numel()
    axes = torch.eye(request.x.shape[1], dtype=torch.float64)
    candidates = torch.cat([request.mean, _rays(request, axes, RADII)])
    log_scale = request.log_kernels(candidates).amax(1)
    for _ in range(SCALINGS):
        atoms = _programme(request, candidates, log_scale)
        while len(atoms.points) > bound + 1:
            atoms = _without_one(request, atoms)
        atoms, residual = _polished(request, atoms)
        if residual <= tolerance:
            break
        # Rough velocities ask for points where the kernels of some times are small: those are the scale to work in.
        log_scale = request.log_mass(atoms)
    else:
        raise _infeasible(request, atoms)
    if len(atoms.points) > bound:
        for fewer in _along_curves(request, atoms):
            fewer, its_residual = _polished(request, fewer)
            if its_residual <= min(tolerance, max(10 * residual, ROUNDED)):
                atoms, residual = fewer, its_residual
                break
    mixture = GaussianMixture(atoms.points.to(x_t.device), atoms.log_weights.to(x_t.device), 0.0)
    return Realisation(mixture, residual, mixture.components <= bound)


@dataclass(frozen=True, eq=False)
class _Atoms:
    """points `[K, C]`, log_weights `[K]` up to a constant."""

    points: Tensor
    log_weights: Tensor

    def without(self, k: int) -> _Atoms:
        kept = torch.arange(len(self.points)) != k
        return _Atoms(self.points[kept], self.log_weights[kept])


@dataclass(frozen=True, eq=False)
class _Moments:
    """What K points mean for the equations, their weights in units of exp(-log_units) `[K]`.

    kernels: `[N, K]`, the largest of each point 1.  equations: `[N C, K]`, in sizes of the velocities.
    """

    kernels: Tensor
    equations: Tensor
    log_units: Tensor


@dataclass(frozen=True, eq=False)
class _Request:
    """x, u `[N, C]` and t `[N]`, on the CPU in float64."""

    x: Tensor
    u: Tensor
    t: Tensor

    @classmethod
    def of(cls, x_t: Tensor, velocity: Tensor, t: Tensor) -> _Request:
        """What the user gives, checked."""
        if x_t.ndim != 2 or 0 in x_t.shape or velocity.shape != x_t.shape or t.shape != x_t.shape[:1]:
            raise ValueError(
                "x_t and velocity must be [N, C] and t [N], with at least one time and one channel, "
                f"got {tuple(x_t.shape)}, {tuple(velocity.shape)} and {tuple(t.shape)}"
            )
        x, u, t = (values.detach().to("cpu", torch.float64) for values in (x_t, velocity, t))
        for name, values in (("x_t", x), ("velocity", u)):
            if not all_finite(values):
                row = int(values.isfinite().all(1).int().argmin())
                raise ValueError(f"{name} must be finite, got {values[row].tolist()} in row {row}")
        t = as_time("t", t, x)
        ordered, rows = t.sort()
        equal = (ordered.diff() == 0).nonzero().flatten().tolist()
        if equal:
            raise ValueError(
                f"times must be pairwise distinct, got t = {float(ordered[equal[0]]):g} in rows "
                f"{int(rows[equal[0]])} and {int(rows[equal[0] + 1])}: leave one of them out"
            )
        return cls(x, u, t)

    @cached_property
    def mean(self) -> Tensor:
        """m_n `[N, C]`."""
        return x0_from_velocity(self.u, self.x, self.t)

    @cached_property
    def size(self) -> Tensor:
        """What the error of each velocity is measured against, `[N]`."""
        size: Tensor = self.u.norm(dim=1).clamp(min=SLOW)
        return size

    @cached_property
    def width(self) -> Tensor:
        """Deviation of each kernel, σ_n/α_n, within the scale of data and noise `[N]`."""
        spread = max(1.0, float(torch.cdist(self.mean, self.mean).amax()))
        return (self.t / (1 - self.t)).clamp(max=2 * spread)

    def away(self, points: Tensor) -> Tensor:
        """x_n - α_n μ `[N, K, C]` for points `[K, C]`."""
        return self.x[:, None] - (1 - self.t)[:, None, None] * points

    def log_kernels(self, points: Tensor) -> Tensor:
        """log K_n(μ) `[N, K]` for points `[K, C]`."""
        return self.away(points).square().sum(-1) / (-2 * self.t.square())[:, None]

    def log_mass(self, atoms: _Atoms) -> Tensor:
        """log Σ_k A_k K_n(μ_k) `[N]`."""
        return (self.log_kernels(atoms.points) + atoms.log_weights).logsumexp(1)

    def moments(self, points: Tensor, log_scale: Tensor) -> _Moments:
        """The equations at points `[K, C]`, where the kernels of each time are divided by exp(log_scale) `[N]`."""
        logits = self.log_kernels(points) - log_scale[:, None]
        log_units = logits.amax(0)
        kernels = (logits - log_units).exp()
        gaps = (points - self.mean[:, None]) / (self.t * self.size)[:, None, None]  # [N, K, C]
        return _Moments(kernels, (kernels[..., None] * gaps).mT.flatten(0, 1), log_units)

    def errors(self, atoms: _Atoms) -> Tensor:
        """‖u - u_n‖ in sizes of u_n `[N]`, u the velocities of the mixture."""
        mixture = GaussianMixture(atoms.points, atoms.log_weights, 0.0)
        missed: Tensor = (mixture.velocity(self.x, self.t) - self.u).norm(dim=1)
        return missed / self.size


def _programme(request: _Request, points: Tensor, log_scale: Tensor) -> _Atoms:
    """The vertex that violates the equations least, with more points `[K, C]` for as long as they help.

    log_scale: that of the kernels of each time `[N]`.
    """
    axes = torch.eye(request.x.shape[1], dtype=torch.float64)
    found, violation = _Atoms(request.mean, torch.zeros_like(request.t)), torch.inf
    for _ in range(ROUNDS):
        moments = request.moments(points, log_scale)
        vertex = _vertex(moments)
        if vertex is None or vertex.violation >= violation:
            break
        kept, violation = vertex.weights > NEGLIGIBLE, vertex.violation
        found = _Atoms(points[kept], vertex.weights[kept].log() - moments.log_units[kept])
        if violation < SOLVED:
            break
        # Σ_n w_n·(μ - m_n) K_n(μ) is largest, along a line, where that is a direction w_n of the duals.
        pool = _rays(request, torch.cat([vertex.duals.reshape(request.x.shape), axes]), FAR)
        offered = request.moments(pool, log_scale)
        gains = vertex.duals @ offered.equations + vertex.floor_duals @ offered.kernels
        gains, best = gains.topk(min(4 * request.x.numel(), len(pool)))
        points = torch.cat([points, pool[best[gains > SOLVED]]]).unique(dim=0)
    return found


def _rays(request: _Request, directions: Tensor, radii: Sequence[float]) -> Tensor:
    """Points `[K, C]` both ways from every m_n along directions `[D, C]`, `radii` in widths of that time's kernel."""
    length = directions.norm(dim=1, keepdim=True)
    directions = torch.where(length > 0, directions / length, 0.0)
    reach = request.width[:, None] * torch.tensor([sign * r for r in radii for sign in (1, -1)], dtype=torch.float64)
    return (request.mean[:, None, None] + reach[..., None, None] * directions).flatten(0, 2)


@dataclass(frozen=True, eq=False)
class _Vertex:
    """weights `[K]`, their violation, and what it changes by with the equations' right sides, `[N C]`, and the floors,
    `[N]`: the duals."""

    weights: Tensor
    violation: float
    duals: Tensor
    floor_duals: Tensor


def _vertex(moments: _Moments) -> _Vertex | None:
    """The least ‖equations B‖₁ over weights B >= 0 with kernels B >= 1; None where the solver gives up."""
    from scipy.optimize import linprog

    equations, kernels = moments.equations.numpy(), moments.kernels.numpy()
    times, count = kernels.shape
    rows = len(equations)
    for tolerance in (1e-9, 1e-7):  # the first is too tight for some programmes
        answer = linprog(
            np.concatenate([np.zeros(count), np.ones(2 * rows)]),
            A_eq=np.concatenate([equations, np.eye(rows), -np.eye(rows)], axis=1),
            b_eq=np.zeros(rows),
            A_ub=np.concatenate([-kernels, np.zeros((times, 2 * rows))], axis=1),
            b_ub=-np.ones(times),
            method="highs-ds",
            options={"primal_feasibility_tolerance": tolerance, "dual_feasibility_tolerance": tolerance},
        )
        if answer.x is not None:
            duals, floor_duals = (torch.from_numpy(side.marginals) for side in (answer.eqlin, answer.ineqlin))
            return _Vertex(torch.from_numpy(answer.x[:count]), float(answer.fun), duals, -floor_duals)
    return None


def _without_one(request: _Request, atoms: _Atoms) -> _Atoms:
    """Carathéodory's step: the weights change so that no equation does, until the first of them is 0."""
    moments = request.moments(atoms.points, request.log_mass(atoms))
    rows = moments.equations * (atoms.log_weights + moments.log_units).exp()  # solved by ones
    null = torch.linalg.svd(rows).Vh[len(rows) :]  # of two dimensions at least
    change = torch.linalg.svd(null.sum(1)[None]).Vh[1] @ null  # orthogonal to ones, so of both signs
    first = int(change.abs().argmax())
    factors = 1 - change / change[first]
    return _Atoms(atoms.points, atoms.log_weights + factors.clamp(min=0).log()).without(first)


def _along_curves(request: _Request, atoms: _Atoms) -> Iterator[_Atoms]:
    """Fenchel and Bunt's reduction, N·C atoms of N·C + 1, for one pair of points after another, near ones first."""
    points, log_mass = atoms.points, request.log_mass(atoms)
    weights = (atoms.log_weights + request.moments(points, log_mass).log_units).exp()

    def under_way(j: int, i: int, share: float) -> tuple[_Atoms, Tensor]:
        """The atoms with point j at `share` of its way to point i, and the factors of their weights, equal at first."""
        moved = points.clone()
        moved[j] = points[j].lerp(points[i], share)
        moments = request.moments(moved, log_mass)
        null = torch.linalg.svd(moments.equations * weights).Vh[-1]
        factors = null * null.sum().sign()
        return _Atoms(moved, (factors.clamp(min=0) * weights).log() - moments.log_units), factors

    def past(j: int, i: int, share: float) -> bool:
        return bool(under_way(j, i, share)[1].amin() <= 0)

    pairs = torch.cdist(points, points).fill_diagonal_(torch.inf).flatten().argsort()[:WAYS]
    for j, i in (divmod(pair, len(points)) for pair in pairs.tolist() if pair % (len(points) + 1)):
        stop = next((stop for stop in range(1, STOPS) if past(j, i, stop / STOPS)), STOPS)
        low, high = (stop - 1) / STOPS, stop / STOPS
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if past(j, i, middle) else (middle, high)
        there, factors = under_way(j, i, low)
        if bool(factors.amin() > 0):
            yield there.without(int(factors.argmin()))


def _polished(request: _Request, atoms: _Atoms) -> tuple[_Atoms, float]:
    """Gauss-Newton's steps of least norm for as long as the residual falls, and what it has fallen to."""
    residual = float(request.errors(atoms).amax())
    for _ in range(STEPS):
        if residual < ROUNDED:
            break
        step = _step(request, atoms)
        for halving in range(10):
            points, log_weights = (change / 2**halving for change in (step.points, step.log_weights))
            tried = _Atoms(atoms.points + points, atoms.log_weights + log_weights)
            error = float(request.errors(tried).amax())
            if error < residual:
                break
        else:
            break
        atoms, residual = tried, error
    return atoms, residual


def _step(request: _Request, atoms: _Atoms) -> _Atoms:
    """The least changes of points and log-weights that solve the linearised equations.

    With posterior weights p_nk and means M_n,

        ∂M_n/∂log A_k = p_nk (μ_k - M_n),    ∂M_n/∂μ_k = p_nk (I + (μ_k - M_n) gᵀ),    g = α_n (x_n - α_n μ_k)/σ_n².
    """
    points, shape = atoms.points, atoms.points.shape
    p = (request.log_kernels(points) + atoms.log_weights).softmax(1)  # [N, K]
    gaps = points - (p @ points)[:, None]  # [N, K, C]
    g = ((1 - request.t) / request.t.square())[:, None, None] * request.away(points)
    # A point is moved in units of the narrowest kernel at which it counts.
    seen = p.clamp(min=torch.finfo(p.dtype).tiny)
    units = (request.width[:, None] * (seen.amax(0) / seen).sqrt()).amin(0)[:, None]  # [K, 1]
    by_point = torch.eye(shape[1], dtype=p.dtype) + gaps[..., :, None] * g[..., None, :]  # [N, K, C, C]
    by_point = (p[..., None, None] * by_point * units[..., None]).transpose(1, 2).flatten(2)  # [N, C, K C]
    jacobian = torch.cat([by_point, (p[..., None] * gaps).mT], dim=2)  # [N, C, K C + K]
    scale = (request.t * request.size)[:, None]
    missing = (request.mean - p @ points) / scale
    rows = (jacobian / scale[..., None]).flatten(0, 1)
    step = torch.linalg.lstsq(rows, missing.reshape(-1, 1), rcond=RANK, driver="gelsd").solution.squeeze(1)
    step = step / step.abs().amax().clamp(min=1)
    return _Atoms(step[: points.numel()].reshape(shape) * units, step[points.numel() :])


def _infeasible(request: _Request, atoms: _Atoms) -> InfeasibleError:
    errors = request.errors(atoms)
    row = int(errors.argmax())
    return InfeasibleError(
        f"no mixture was found through these velocities: the nearest one misses that at t = {float(request.t[row]):g} "
        f"(row {row}) by {float(errors[row]):.2g} of its size. Velocities of a smooth teacher are within reach; where "
        "they jump between neighbouring times, the search may end before it gets to the weights that the theorem "
        "promises: smooth them, or leave times out",
        row,
        float(errors[row]),
    )
