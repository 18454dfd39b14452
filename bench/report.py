"""Tables of a result file, and the targets that cnbd is to reach."""

import statistics

from machine import GIB, MIB
from servers import AGAIN, AUTO, BASE, FASTEST, LARGE, LOOP, OFFERED, ZSTD1, ZSTD3


class Results:
    """What was measured, by round, server, workload and figure, in one run or in
    several on one machine, such as one for times and one for what is stored."""

    def __init__(self, runs):
        self.machine = runs[0]["machine"]
        self.rounds = [n | {"sets": run["sets"]} for run in runs for n in run["rounds"]]
        self.names = list(dict.fromkeys(name for run in runs for name in run["servers"]))

    def get(self, n, server, workload, figure):
        """A figure of round n, or None where there is none."""
        value = self.rounds[n]["servers"].get(server, {}).get(workload, {}).get(figure)
        return None if value is None else float(value)

    def error(self, server, workload):
        """Whether a workload has failed."""
        return any("error" in r["servers"].get(server, {}).get(workload, {}) for r in self.rounds)

    def each(self, figure):
        """Values of figure(n) for the rounds n that have it."""
        values = [figure(n) for n in range(len(self.rounds))]
        return [v for v in values if v is not None]

    def servers(self):
        return [name for name in self.names if any(name in r["servers"] for r in self.rounds)]


def quotient(a, b):
    return None if a is None or not b else a / b


def spread(values, form):
    """Median, and least to most where there are several."""
    text = form % statistics.median(values)
    return text if len(values) == 1 else f"{text} ({form % min(values)}–{form % max(values)})"


def markdown(head, rows):
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head)] + rows) + "\n"


class Target:
    """A row of what is to be reached: figure(results, n) at least, or at most, bound."""

    def __init__(self, measure, least, bound, figure, form="%.2f"):
        self.measure, self.least, self.bound, self.figure, self.form = measure, least, bound, figure, form

    def row(self, results):
        values = results.each(lambda n: self.figure(results, n))
        goal = ("≥ " if self.least else "≤ ") + self.form % self.bound
        if not values:
            return [self.measure, goal, "–", "not measured"]
        hits = [v >= self.bound if self.least else v <= self.bound for v in values]
        median = statistics.median(values)
        ok = median >= self.bound if self.least else median <= self.bound
        verdict = "reached" if ok else "**not reached**"
        if len(set(hits)) == 2:
            verdict += f" (in {sum(hits)} of {len(hits)} rounds)"
        return [self.measure, goal, spread(values, self.form), verdict]


def against(server, peer, workload, figure):
    """The ratio of a figure of two servers in a round."""
    return lambda r, n: quotient(r.get(n, server, workload, figure), r.get(n, peer, workload, figure))


def ratio(r, n, server, stored, data):
    """Data by live stored bytes; data is (workload) that has their amount, or None for that of the image."""
    amount = r.get(n, server, data, "data") if data else r.rounds[n]["sets"]["root"]["data"]
    return quotient(amount, r.get(n, server, stored, "live"))


def ratios(server, stored, data, peer, peer_stored, peer_data):
    return lambda r, n: quotient(ratio(r, n, server, stored, data), ratio(r, n, peer, peer_stored, peer_data))


def cpu(r, n, server, workload):
    """Processor seconds of server and kernel for a GiB."""
    parts = [r.get(n, server, workload, side + " cpu s/GiB") for side in ("server", "kernel")]
    return None if None in parts else sum(parts)


def above_floor(r, n):
    """The pair without its round trips, by the disk's own least."""
    least, pair = r.rounds[n]["floors"], r.get(n, AUTO, "pairs", "p50 us")
    if pair is None:
        return None
    disk = min(least[f]["p50 us"] for f in least if f.endswith("written space"))
    return (pair - least["two round trips (nbdkit memory)"]["p50 us"]) / disk


def overhead(r):
    """What promise P6 allows with the defaults: cache, payloads, map, and the overhead
    of 64 MiB and 12 for each worker, of which there are as many as processors."""
    return (256 + 64 + 32 + 64 + 12 * min(8, r.machine["processors"])) * MIB


def peak(r, n):
    """Most memory of any of the lives with default limits."""
    peaks = [r.get(n, AUTO, life, "peak") for life in LIVES]
    peaks = [p for p in peaks if p is not None]
    return max(peaks) / overhead(r) if peaks else None


# Those with the limits of memory that are the default.
LIVES = ("empty", "with data", "overwritten", "copied in", "copied out", "storm", "with source", "with postgres", "with noise")
AT_LEAST, AT_MOST = True, False
FOUR = [("depth 1 on each", "mix, depth 1, connections "), ("depth 16 on each", "mix, depth 16, connections "), ("depth 16 on each, many requests at once", "pipelined mix, connections ")]

TARGETS = [
    Target("sequential write + FLUSH, `auto` / Btrfs zstd:1", AT_LEAST, 1.5, against(AUTO, ZSTD1, "write", "MiB/s")),
    Target("its ratio data : stored at once", AT_LEAST, 2.0, lambda r, n: ratio(r, n, AUTO, "stored, write", "write")),
    Target("the same, codec zstd fastest / Btrfs zstd:1", AT_LEAST, 0.8, against(FASTEST, ZSTD1, "write", "MiB/s")),
    Target("its ratio / that of Btrfs zstd:1", AT_LEAST, 1.0, ratios(FASTEST, "stored, write", "write", ZSTD1, "stored, write", "write")),
    Target("ratio after idle, `auto` / Btrfs zstd:3", AT_LEAST, 1.1, ratios(AUTO, "stored, idle", None, ZSTD3, "stored, copied", None)),
    Target("ratio after the storm, at once / Btrfs zstd:1", AT_LEAST, 1.0, ratios(AUTO, "stored, storm", "storm", ZSTD1, "stored, storm", "storm")),
    Target("ratio after the storm and an idle minute / Btrfs zstd:1", AT_LEAST, 1.2, ratios(AUTO, "stored, storm and a minute", "storm", ZSTD1, "stored, storm", "storm")),
    Target("ratio after the storm and long idle / its own before the storm", AT_LEAST, 0.95, ratios(AUTO, "stored, storm and idle", "storm", AUTO, "stored, idle", None)),
    Target("sequential read, cold / Btrfs zstd:1", AT_LEAST, 1.5, against(AUTO, ZSTD1, "read cold", "MiB/s")),
    Target("sequential read, warm / nbdkit raw", AT_LEAST, 1.0, against(AUTO, BASE, "read warm", "MiB/s")),
    Target("the same, cache as large as the image", AT_LEAST, 1.0, against(LARGE, BASE, "read warm", "MiB/s")),
    Target("4 KiB random read within cache, depth 1 / nbdkit raw", AT_LEAST, 1.2, against(AUTO, BASE, "cached read, depth 1", "iops")),
    Target("the same, depth 16", AT_LEAST, 2.5, against(AUTO, BASE, "cached read, depth 16", "iops")),
    Target("the same, by a client that sends many requests at once", AT_LEAST, 2.5, against(AUTO, BASE, "pipelined cached read", "iops")),
    *[Target(f"4 KiB random read, memory limited, depth {d} / {peer}", AT_LEAST, bound, against(AUTO, peer, f"limited read, depth {d}", "iops")) for d in (1, 16) for peer, bound in ((ZSTD1, 2.0), (BASE, 0.9))],
    Target("4 KiB random write, depth 16, no FLUSH / nbdkit raw", AT_LEAST, 3.0, against(AUTO, BASE, "write, depth 16", "iops")),
    Target("the same, by a client that sends many requests at once", AT_LEAST, 3.0, against(AUTO, BASE, "pipelined write", "iops")),
    Target("4 KiB random write, FLUSH every 32, depth 1 / nbdkit raw", AT_LEAST, 3.0, against(AUTO, BASE, "write, FLUSH every 32, depth 1", "iops")),
    Target("the same, depth 16", AT_LEAST, 4.0, against(AUTO, BASE, "write, FLUSH every 32, depth 16", "iops")),
    Target("the same, by a client that sends many requests at once", AT_LEAST, 4.0, against(AUTO, BASE, "pipelined write, FLUSH every 32", "iops")),
    Target("4 KiB write + FLUSH, p50 / nbdkit raw", AT_MOST, 0.9, against(AUTO, BASE, "pairs", "p50 us")),
    Target("the same, p99", AT_MOST, 1.0, against(AUTO, BASE, "pairs", "p99 us")),
    Target("p50 without two round trips / the disk's lowest floor", AT_MOST, 1.3, above_floor),
    Target("CPU per GiB written, server + kernel threads, `auto` / Btrfs zstd:1", AT_MOST, 1.0, lambda r, n: quotient(cpu(r, n, AUTO, "write"), cpu(r, n, ZSTD1, "write"))),
    Target("incompressible data, sequential write + FLUSH, `auto` / nbdkit raw", AT_LEAST, 0.9, against(AUTO, BASE, "write noise", "MiB/s")),
    Target("nbdcopy in / Btrfs zstd:1", AT_LEAST, 1.2, against(AUTO, ZSTD1, "copy in", "MiB/s")),
    Target("nbdcopy out / nbdkit raw", AT_LEAST, 1.0, against(AUTO, BASE, "copy out", "MiB/s")),
    *[Target(f"4 connections, 4 KiB mix, {d} / one connection", AT_LEAST, 1.5, lambda r, n, w=w: quotient(r.get(n, AUTO, w + "4", "iops"), r.get(n, AUTO, w + "1", "iops"))) for d, w in FOUR],
    Target("peak memory / caches configured + the overhead of P6", AT_MOST, 1.0, peak),
    Target("allocations per 4 KiB read hit", AT_MOST, 0, lambda r, n: r.get(n, AUTO, "cached read, depth 16", "allocations"), "%.3f"),
    Target("allocations per 4 KiB write", AT_MOST, 0, lambda r, n: r.get(n, AUTO, "write, depth 16", "allocations"), "%.3f"),
]

# Title, then columns: head, workload, figure, form; k in front is for thousands.
TABLES = [
    ("Sequential, 1 MiB at depth 8, one connection (MiB/s)", [
        ("write + FLUSH", "write", "MiB/s", "%.0f"), ("read, cold", "read cold", "MiB/s", "%.0f"), ("read, warm", "read warm", "MiB/s", "%.0f"),
        ("nbdcopy in", "copy in", "MiB/s", "%.0f"), ("nbdcopy out", "copy out", "MiB/s", "%.0f")]),
    ("Sequential write + FLUSH of the other sets (MiB/s)", [
        ("source", "write source", "MiB/s", "%.0f"), ("PostgreSQL", "write postgres", "MiB/s", "%.0f"), ("incompressible", "write noise", "MiB/s", "%.0f")]),
    ("4 KiB random reads (thousands a second)", [
        (f"{title}, depth {d}", f"{name} read, depth {d}", "iops", "k%.1f") for name, title in (("cached", "in cache"), ("beyond", "beyond cache"), ("limited", "memory limited")) for d in (1, 16)]),
    ("4 KiB random writes and mixes (thousands a second)", [
        ("write, depth 16", "write, depth 16", "iops", "k%.1f"),
        ("FLUSH every 32, depth 1", "write, FLUSH every 32, depth 1", "iops", "k%.1f"), ("FLUSH every 32, depth 16", "write, FLUSH every 32, depth 16", "iops", "k%.1f")]
        + [(f"mix, depth {d}, {c} conn.", f"mix, depth {d}, connections {c}", "iops", "k%.1f") for d in (1, 16) for c in (1, 4)]),
    ("4 KiB at depth 16, by a client that sends many requests at once (thousands a second)", [
        ("read in cache", "pipelined cached read", "iops", "k%.1f"), ("write", "pipelined write", "iops", "k%.1f"), ("FLUSH every 32", "pipelined write, FLUSH every 32", "iops", "k%.1f")]
        + [(f"mix, {c} conn.", f"pipelined mix, connections {c}", "iops", "k%.1f") for c in (1, 4)]),
    ("4 KiB write + FLUSH (µs)", [("p50", "pairs", "p50 us", "%.0f"), ("p99", "pairs", "p99 us", "%.0f")]),
]


def cell(r, server, workload, figure, form):
    scale = 1e-3 if form.startswith("k") else 1
    form = form.lstrip("k")
    values = r.each(lambda n: r.get(n, server, workload, figure))
    if not values:
        return "error" if r.error(server, workload) else "–"
    text = form % (statistics.median(values) * scale)
    ratios_ = r.each(lambda n: quotient(r.get(n, server, workload, figure), r.get(n, BASE, workload, figure)))
    if server != BASE and ratios_:
        text += " ×" + spread(ratios_, "%.2f")
    return text


def medians(r, figure, form):
    values = r.each(figure)
    return form % statistics.median(values) if values else "–"


def costs(r):
    """Processor time, memory, start and stop."""
    head = ["server", "CPU s/GiB written: server + kernel", "read cold", "read warm", "peak MiB", "start ms, empty / with data", "stop ms, after writing / reading"]
    rows = []
    for s in r.servers():
        def seconds(workload):
            return " + ".join(medians(r, lambda n: r.get(n, s, workload, side + " cpu s/GiB"), "%.2f") for side in ("server", "kernel"))

        def ms(figure, *lives):
            return " / ".join(medians(r, lambda n, l=l: r.get(n, s, l, figure), "%.0f") for l in lives)

        def most(n):
            peaks = [r.get(n, s, l, "peak") for l in LIVES]
            return max((p for p in peaks if p is not None), default=None)

        peaks = r.each(most)
        rows.append([s, seconds("write"), seconds("read cold"), seconds("read warm"), "%.0f" % (max(peaks) / MIB) if peaks else "–", ms("start ms", "empty", "with data"), ms("stop ms", "empty", "with data")])
    return markdown(head, rows)


def stored(r):
    """Ratios of all sets, and of the storm."""
    states = [("root", "stored, write", "write"), ("source", "stored, write source", "write source"), ("PostgreSQL", "stored, write postgres", "write postgres"), ("incompressible", "stored, write noise", "write noise"),
              ("root, after idle", "stored, idle", None), ("after the storm", "stored, storm", "storm"), ("and a minute", "stored, storm and a minute", "storm"), ("and long idle", "stored, storm and idle", "storm")]
    rows = []
    for s in r.servers():
        row = [s]
        for _, name, data in states:
            text = medians(r, lambda n: ratio(r, n, s, name, data), "%.2f")
            dead = r.each(lambda n: quotient(r.get(n, s, name, "garbage"), r.get(n, s, name, "live")))
            host = r.each(lambda n: quotient(r.get(n, s, name, "host"), r.get(n, s, name, "live")))
            if s.startswith("cnbd") and host:
                settled = r.each(lambda n: r.get(n, s, name, "settled"))
                text += f" (+{statistics.median(dead):.0%} dead; host {statistics.median(host):.2f}" + ("" if all(settled) else "; still changing") + ")"
            row.append(text)
        rows.append(row)
    return markdown(["server"] + [s[0] for s in states], rows)


def curve(r):
    """What is offered to cnbd in a stream, and what becomes of it."""
    rows = []
    for s in r.servers():
        for rate in OFFERED:
            name = f"write at {rate}"
            speeds = r.each(lambda n: r.get(n, s, name, "MiB/s"))
            if speeds:
                rows.append([s, str(rate or "all it takes"), spread(speeds, "%.0f"), medians(r, lambda n: ratio(r, n, s, "stored, " + name, name), "%.2f"), medians(r, lambda n: r.get(n, s, name, "server cpu s/GiB"), "%.2f")])
    return rows


def floors(r):
    rows = []
    for name in r.rounds[0]["floors"]:
        p50, p99 = ([n["floors"][name][p] for n in r.rounds] for p in ("p50 us", "p99 us"))
        rows.append([name.replace("|", "\\|"), spread(p50, "%.0f"), spread(p99, "%.0f")])
    return markdown(["4 KiB", "p50 µs", "p99 µs"], rows)


def distance(r):
    """How far cnbd, and nbdkit, are from the bare loop."""
    rows = []
    for workload, figure in (("read warm", "MiB/s"), ("cached read, depth 1", "iops"), ("cached read, depth 16", "iops"), ("write, depth 16", "iops"), ("pipelined cached read", "iops"), ("pipelined write", "iops")):
        row = [r.each(lambda n: against(s, LOOP, workload, figure)(r, n)) for s in (AUTO, BASE)]
        if all(row):
            rows.append([workload] + [spread(values, "%.2f") for values in row])
    return rows


def noise(r):
    """How far the base row is from itself."""
    rows = []
    for _, columns in TABLES:
        for _, workload, figure, _ in columns:
            values = r.each(lambda n: quotient(r.get(n, AGAIN, workload, figure), r.get(n, BASE, workload, figure)))
            if values:
                rows.append([workload + (", " + figure if figure.endswith(" us") else ""), spread(values, "%.2f")])
    return rows


def conditions(run):
    """On what, how and when a run was made."""
    o, m = run["options"], run["machine"]
    sets = "; ".join(f"{name} {s['size'] / MIB:.0f} MiB with {s['data'] / MIB:.0f} of data" for name, s in run["sets"].items())

    def percent(figure):
        return ", ".join(f"{n[figure]:.0%}" for n in run["rounds"])

    return (
        f"* **{run['date']}**: `{run['command']}`\n"
        f"  {m['processor']}, {m['processors']} processors, {m['memory'] / GIB:.0f} GiB of memory, Linux {m['kernel']}, {m['filesystem']} below; {', '.join(run['versions'])}.\n"
        f"  Rounds: {len(run['rounds'])}; {o['seconds']:g} s for each random workload; memory limit {o['limit'] / MIB:.0f} MiB. Sets: {sets}.\n"
        f"  Load when rounds began: {', '.join('%.1f' % n['load'] for n in run['rounds'])}; of the processors, others had {percent('others')} and the hypervisor {percent('stolen')}.\n"
    )


def tables(runs):
    """All of it, in Markdown."""
    r = Results(runs)
    out = [
        *map(conditions, runs),
        "\n### Target / reached\n",
        markdown(["measure", "to reach", "reached, median (least–most)", ""], [t.row(r) for t in TARGETS]),
    ]
    for title, columns in TABLES:
        rows = [[s] + [cell(r, s, *c[1:]) for c in columns] for s in r.servers()]
        rows = [row for row in rows if any(text != "–" for text in row[1:])]
        used = [i for i in range(1, len(columns) + 1) if any(row[i] != "–" for row in rows)]
        if used:
            out += [f"\n### {title}\n", markdown(["server"] + [columns[i - 1][0] for i in used], [[row[0]] + [row[i] for i in used] for row in rows])]
    out += ["\n### Processor time, memory, start, stop\n", costs(r), "\n### Data : stored\n", stored(r)]
    if curve(r):
        out += ["\n### A stream at several speeds\n", markdown(["server", "offered MiB/s", "written MiB/s, with its FLUSH", "data : stored at once", "CPU s/GiB"], curve(r))]
    out += ["\n### Floors of this machine\n", floors(r)]
    if distance(r):
        out += ["\n### Beside the least that a server in Go can be\n", markdown(["workload", f"{AUTO} / {LOOP}", f"{BASE} / {LOOP}"], distance(r))]
    if noise(r):
        out += ["\n### The base row beside itself\n", markdown(["workload", f"{AGAIN} / {BASE}"], noise(r))]
    return "\n".join(out)
