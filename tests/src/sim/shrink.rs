//! Makes a failing run smaller: fewer nodes, fewer steps, fewer troubles, fewer calls, as long as it fails in the same way.
//!
//! Leaving something out changes the luck of what follows, so this is a search among other runs, not a proof that what is left
//! is needed. Sets are reduced as in Zeller and Hildebrandt's "Simplifying and isolating failure-inducing input" (2002), by
//! leaving out ever smaller parts.

use super::node::Cluster;
use super::world::{Keep, Options, Report, run};
use std::fmt::Write as _;

/// The smallest failing run that was found.
#[derive(Clone, Debug)]
pub struct Shrunk {
    /// How it is made.
    pub options: Options,
    /// What came of it.
    pub report: Report,
    /// How many runs the search took.
    pub runs: u64,
}

/// The way of failing: what was said, without its numbers.
#[must_use]
pub fn kind_of(message: &str) -> String {
    let line = message.lines().next().unwrap_or_default();
    line.chars().filter(|letter| !letter.is_ascii_digit()).take(48).collect()
}

struct Search<'a, C> {
    cluster: &'a C,
    seed: u64,
    kind: String,
    best: Shrunk,
    runs_max: u64,
}

/// Shrinks the run of `seed` with `options`, whose report is `report`, by at most `runs_max` runs. Nothing, if it did not fail.
pub fn shrink<C: Cluster>(cluster: &C, options: &Options, report: &Report, runs_max: u64) -> Option<Shrunk> {
    let failure = report.failure.as_ref()?;
    let options = Options { trace: false, list_calls: true, ..options.clone() };
    let best = Shrunk { options, report: report.clone(), runs: 0 };
    let mut search = Search { cluster, seed: report.seed, kind: kind_of(&failure.message), best, runs_max };
    // Once more, with its calls listed.
    let same = search.best.options.clone();
    if !search.accepts(same) {
        return Some(search.best);
    }
    for nodes in 1..report.nodes {
        let fewer = Options { nodes: Some(nodes), ..search.best.options.clone() };
        if search.accepts(fewer) {
            break;
        }
    }
    for _ in 0..2 {
        while search.best.options.steps > 100 {
            let shorter = Options { steps: search.best.options.steps / 2, ..search.best.options.clone() };
            if !search.accepts(shorter) {
                break;
            }
        }
        let troubles: Vec<u64> = search.best.report.struck.iter().map(|struck| struck.number).collect();
        search.reduce(&troubles, |keep, kept| keep.troubles = Some(kept.iter().copied().collect()));
        let calls: Vec<(usize, usize)> = search
            .best
            .report
            .calls
            .iter()
            .map(|call| (call.command.id.client, call.command.id.sequence))
            .collect();
        search.reduce(&calls, |keep, kept| keep.calls = Some(kept.iter().copied().collect()));
    }
    Some(search.best)
}

impl<C: Cluster> Search<'_, C> {
    /// Whether the run still fails; then it is the best one.
    fn accepts(&mut self, options: Options) -> bool {
        if self.best.runs >= self.runs_max {
            return false;
        }
        self.best.runs += 1;
        let report = run(self.cluster, self.seed, &options);
        let same = report.failure.as_ref().is_some_and(|failure| kind_of(&failure.message) == self.kind);
        if same {
            self.best = Shrunk { options, report, runs: self.best.runs };
        }
        same
    }

    fn reduce<T: Copy>(&mut self, all: &[T], set: impl Fn(&mut Keep, &[T])) {
        let mut kept = all.to_vec();
        let mut part = kept.len();
        while part > 0 && !kept.is_empty() {
            let mut at = 0;
            while at < kept.len() {
                let mut fewer = kept.clone();
                fewer.drain(at..(at + part).min(kept.len()));
                let mut options = self.best.options.clone();
                set(&mut options.keep, &fewer);
                if self.accepts(options) {
                    kept = fewer;
                } else {
                    at += part;
                }
            }
            part /= 2;
        }
    }
}

impl Shrunk {
    /// The schedule, and how to run it again.
    #[must_use]
    pub fn describe(&self) -> String {
        let Self { options, report, runs } = self;
        let mut out = format!(
            "smallest failing run found, in {runs} runs: seed {}, {} nodes, {} steps, {} troubles, {} calls\n",
            report.seed,
            report.nodes,
            report.steps,
            report.struck.len(),
            report.calls.len()
        );
        let mut lines: Vec<(u64, String)> = report
            .struck
            .iter()
            .map(|struck| (struck.time, format!("node {}  {:?}", struck.node, struck.trouble)))
            .collect();
        lines.extend(report.calls.iter().map(|call| {
            let id = call.command.id;
            let text = format!(
                "node {}  client {} call {}: key {} {:?}",
                call.node, id.client, id.sequence, call.command.key, call.command.operation
            );
            (call.time, text)
        }));
        lines.sort();
        for (time, line) in lines {
            let _ = writeln!(out, "{:>12.3} ms  {line}", time as f64 / 1e6);
        }
        if let Some(failure) = &report.failure {
            let _ = writeln!(
                out,
                "{:>12.3} ms  step {}: {}",
                report.virtual_ns as f64 / 1e6,
                failure.step,
                failure.message
            );
        }
        let _ = write!(
            out,
            "again: simulate --seed {} --nodes {} --steps {}",
            report.seed, report.nodes, options.steps
        );
        let list = |items: Vec<String>| if items.is_empty() { "none".to_owned() } else { items.join(",") };
        if let Some(troubles) = &options.keep.troubles {
            let _ = write!(out, " --troubles {}", list(troubles.iter().map(u64::to_string).collect()));
        }
        if let Some(calls) = &options.keep.calls {
            let calls = calls.iter().map(|(client, sequence)| format!("{client}:{sequence}")).collect();
            let _ = write!(out, " --calls {}", list(calls));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_that_differ_in_numbers_are_of_one_kind() {
        assert_eq!(
            kind_of("node 1 applied index 7 after 9\nmore"),
            kind_of("node 0 applied index 12 after 13")
        );
        assert_ne!(kind_of("node 1 spins"), kind_of("node 1 leads"));
    }
}
