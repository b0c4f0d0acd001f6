"""The report's table of the correction: where old log-probabilities came from, what mask and clip did, what leaked.

A row stands only where some run has something to say in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean

from rljob import plots
from rljob.plots import PHASES
from rljob.record import EXACT_SOURCES
from rljob.report_tables import ReportedRun, escaped, table, table_row
from rljob.route_plots import mean_seconds, source_shares
from rljob_api.diagnostics import AuditReport, Diagnostics, Divergence
from rljob_api.messages import EwmaReport
from rljob_runtime.correction.audit import pool_audits

NOTHING = "–"
NO_BREAK = "\u00a0"


def correction_table(runs: Sequence[ReportedRun]) -> str:
    """Means are over all steps of a run unless the row says otherwise."""
    last = plots.last_steps([run.plotted for run in runs])
    rows: list[tuple[str, Callable[[ReportedRun], str]]] = [
        (f"Reward, mean of the last {last} steps", lambda run: f"{plots.mean_reward(run.steps, last):.4f}"),
        ("Kept by the discrepancy mask", lambda run: f"{mean(step.keep_fraction for step in run.steps):.4f}"),
        ("Stopped by the clip", lambda run: f"{mean(step.clip_fraction for step in run.steps):.4f}"),
        ("… A ≥ 0 / A < 0", _clip_sides),
        ("Leak", lambda run: NOTHING if run.verdict is None else str(run.verdict)),
        ("… RMS of log r_d by staleness", _rms_by_staleness),
        ("… largest, staleness 0 / above", _largest),
        (
            "… flatness test on the record, p",
            lambda run: NOTHING if isinstance(run.leak, str) else f"{run.leak.p_value:.3f}",
        ),
        ("Tokens by source", _sources),
        ("… exact, of the trained", _exact_share),
        *[(f"Step: {name}", lambda run, field=field: _cost(run, field)) for name, field, _ in PHASES],
        ("Step, seconds", lambda run: f"{mean_seconds(run.steps, 'seconds_total'):.3f}"),
        ("Engine against trainer, exact tokens: KL (k3)", _divergence("discrepancy", lambda d: f"{d.kl_k3:.2e}")),
        ("… p99 of |log r_d|", _divergence("discrepancy", lambda d: f"{d.p99_abs:.2e}")),
        ("Target against engine: KL (k3)", _divergence("importance", lambda d: f"{d.kl_k3:.2e}")),
        ("… χ²", _divergence("importance", lambda d: f"{d.chi2_token:.2e}")),
        ("… effective share of tokens", _divergence("importance", lambda d: f"{d.effective_sample_share:.4f}")),
        ("… largest weight", _divergence("importance", lambda d: f"{d.weight_max:.3g}")),
        ("EWMA, centre of mass, versions", _average(lambda e: e.center_of_mass)),
        ("… mean staleness less that", _average(lambda e: e.staleness_gap)),
        ("Audited tokens", _audit(lambda a: f"{a.tokens:,}")),
        ("… leak, RMS, measured / predicted", _audit(_measured_and_predicted)),
        ("… log r_d, RMS, as used / exact", _audit(lambda a: f"{a.approximate_rms:.2e} / {a.exact_rms:.2e}")),
    ]
    cells = [(name, [value(run) for run in runs]) for name, value in rows]
    return table(
        runs,
        "".join(
            table_row(name, [escaped(cell) for cell in of_runs])
            for name, of_runs in cells
            if any(cell != NOTHING for cell in of_runs)
        ),
    )


def _clip_sides(run: ReportedRun) -> str:
    found = _diagnostics(run)
    if not found:
        return NOTHING
    return f"{mean(d.clip_high_share for d in found):.4f} / {mean(d.clip_low_share for d in found):.4f}"


def _rms_by_staleness(run: ReportedRun) -> str:
    pooled = plots.pooled_discrepancy(run.steps)
    return (
        " · ".join(f"{n}:{NO_BREAK}{stats.rms_log_discrepancy:.1e}" for n, stats in sorted(pooled.items())) or NOTHING
    )


def _largest(run: ReportedRun) -> str:
    pooled = plots.pooled_discrepancy(run.steps)
    fresh = [stats.max_abs_log_discrepancy for staleness, stats in pooled.items() if staleness == 0]
    stale = [stats.max_abs_log_discrepancy for staleness, stats in pooled.items() if staleness > 0]
    return " / ".join(f"{max(found):.1e}" if found else NOTHING for found in (fresh, stale))


def _sources(run: ReportedRun) -> str:
    return " · ".join(f"{name}{NO_BREAK}{share:.1%}" for name, share in source_shares(run.steps).items()) or NOTHING


def _exact_share(run: ReportedRun) -> str:
    shares = {name: share for name, share in source_shares(run.steps).items() if name != "missing"}
    if not shares:
        return NOTHING
    return f"{sum(share for name, share in shares.items() if name in EXACT_SOURCES) / sum(shares.values()):.4f}"


def _cost(run: ReportedRun, field: str) -> str:
    seconds, total = mean_seconds(run.steps, field), mean_seconds(run.steps, "seconds_total")
    return f"{seconds:.3f} s, {seconds / total:.1%}" if total else NOTHING


def _measured_and_predicted(audit: AuditReport) -> str:
    predicted = NOTHING if audit.predicted_leak_rms is None else f"{audit.predicted_leak_rms:.2e}"
    return f"{audit.leak_rms:.2e} / {predicted}"


def _audit(value: Callable[[AuditReport], str]) -> Callable[[ReportedRun], str]:
    def cell(run: ReportedRun) -> str:
        pooled = pool_audits([step.audit for step in run.steps if step.audit is not None and step.audit.tokens])
        return value(pooled) if pooled.tokens else NOTHING

    return cell


def _divergence(of: str, value: Callable[[Divergence], str]) -> Callable[[ReportedRun], str]:
    """Of the last step that has it: a distribution's statistics have no mean over steps."""

    def cell(run: ReportedRun) -> str:
        found = [d for step in _diagnostics(run) if (d := getattr(step, of)) is not None]
        return value(found[-1]) if found else NOTHING

    return cell


def _average(value: Callable[[EwmaReport], float]) -> Callable[[ReportedRun], str]:
    def cell(run: ReportedRun) -> str:
        found = [value(step.ewma) for step in run.steps if step.ewma is not None]
        return f"{found[-1]:.2f}, last step" if found else NOTHING

    return cell


def _diagnostics(run: ReportedRun) -> list[Diagnostics]:
    return [step.diagnostics for step in run.steps if step.diagnostics is not None]
