//! What a command allocates once all is warm: nothing.
//!
//! The first table is of three members in memory (`members`), counted apart for whoever proposes, for the leader and for both
//! followers. The second is of three nodes on threads of this process, on loopback sockets and the disk of the target directory,
//! with either backend: it has what the backends allocate, too, and new blocks whenever a slow disk makes more batches wait than
//! before.
//!
//! What is left are tables that grow with the log, by large pieces: where batches lie, and where they end. Glommio makes a task
//! for each operation, which is its own.
//!
//! `cargo bench -p ringraft-bench --bench allocations`; `RINGRAFT_ALLOCATIONS_SHOWN=5` shows where the first five come from in each
//! row. It fails if a batch allocates in memory.

mod members;

use anyhow::{Context as _, ensure};
use comfy_table::{Cell, CellAlignment, Table, presets};
use members::{IN_FLIGHT, Members, PAYLOAD_BYTES, Part, Tally, Way, is_measuring, steady};
use ringraft::handle::Completion;
use ringraft::runtime::Backend;
use ringraft::{ClusterId, Config, LocalTask, MemberConfig, Node, NodeId, Role};
use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::cell::Cell as Local;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Less than so many for a batch are what grows with the log.
const PER_BATCH_MAX: f64 = 0.1;

/// The system's allocator, counted.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// By [`Part`].
static COUNTS: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];
static IS_COUNTING: AtomicBool = AtomicBool::new(false);
/// How many are still to be shown of this row.
static TO_SHOW: AtomicI64 = AtomicI64::new(0);
static SHOWN: Mutex<Vec<String>> = Mutex::new(Vec::new());

thread_local! {
    static PART: Local<Part> = const { Local::new(Part::Program) };
    /// What shows an allocation allocates.
    static IS_SHOWING: Local<bool> = const { Local::new(false) };
}

fn count() {
    if !IS_COUNTING.load(Relaxed) || IS_SHOWING.get() {
        return;
    }
    let part = PART.get();
    COUNTS[part as usize].fetch_add(1, Relaxed);
    if part != Part::Program && TO_SHOW.load(Relaxed) > 0 && TO_SHOW.fetch_sub(1, Relaxed) > 0 {
        IS_SHOWING.set(true);
        let shown = format!("{part:?} allocates:\n{}", Backtrace::force_capture());
        SHOWN.lock().expect("nothing panics here").push(shown);
        IS_SHOWING.set(false);
    }
}

// SAFETY: the system's allocator does all of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's.
        unsafe { System.realloc(start, layout, bytes) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(start, layout) }
    }
}

/// Allocations by [`Part`], and what they were made for.
struct Row {
    name: String,
    in_flight: usize,
    allocations: [u64; 4],
    commands: u64,
    batches: u64,
}

/// Counts what is allocated while `work` goes on.
fn counted(work: impl FnOnce()) -> [u64; 4] {
    let to_show = std::env::var("RINGRAFT_ALLOCATIONS_SHOWN").ok().and_then(|number| number.parse().ok());
    COUNTS.iter().for_each(|count| count.store(0, Relaxed));
    TO_SHOW.store(to_show.unwrap_or(0), Relaxed);
    IS_COUNTING.store(true, Relaxed);
    work();
    IS_COUNTING.store(false, Relaxed);
    SHOWN.lock().expect("nothing panics here").drain(..).for_each(|shown| eprintln!("{shown}"));
    std::array::from_fn(|part| COUNTS[part].load(Relaxed))
}

fn in_memory(way: Way, in_flight: usize) -> Row {
    let plan = steady(in_flight);
    let mut members = Members::new(|part| PART.set(part));
    let mut load = members.load(way, in_flight);
    members.run(&mut load, plan.warm_up_commands);
    let before = members.counts();
    let allocations = counted(|| members.run(&mut load, plan.commands));
    let after = members.counts();
    let (commands, batches) = (after.commands - before.commands, after.batches - before.batches);
    Row { name: format!("{way:?}").to_lowercase(), in_flight, allocations, commands, batches }
}

/// Three nodes, of which the first leads.
fn start(backend: Backend, directory: &Path) -> anyhow::Result<Vec<Node>> {
    let free = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr();
    let addresses: Vec<SocketAddr> = (0..3).map(|_| free()).collect::<Result<_, _>>()?;
    let members: Vec<MemberConfig> =
        (1..).zip(addresses).map(|(id, address)| MemberConfig { id: NodeId(id), address }).collect();
    let start = |id: NodeId| {
        let dir = directory.join(id.to_string());
        let mut config = Config::new(ClusterId(1), id, members.clone(), dir);
        config.backend = Some(backend);
        let part = if id == NodeId(1) { Part::Leader } else { Part::Followers };
        if part == Part::Followers {
            config.election_timeout *= 10;
        }
        // It runs on the core, and marks it.
        let mark: LocalTask = Box::new(move |_| {
            PART.set(part);
            Box::pin(async {})
        });
        Node::start_with(config, Tally::default, vec![mark]).with_context(|| format!("node {id}"))
    };
    let nodes = members.iter().map(|member| start(member.id)).collect::<Result<Vec<_>, _>>()?;
    let leads =
        nodes[0].handle().wait_status(Duration::from_secs(30), |status| status.role == Role::Leader).1;
    ensure!(leads, "the first node does not lead");
    Ok(nodes)
}

fn on_loopback(backend: Backend, in_flight: usize) -> anyhow::Result<Row> {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let nodes = start(backend, directory.path())?;
    let plan = steady(in_flight);
    let mut pipeline = nodes[0].handle().pipeline();
    let command = bytes::Bytes::from(vec![0x5a; PAYLOAD_BYTES]);
    let mut completions: Vec<Completion> = Vec::new();
    (0..in_flight as u64).for_each(|tag| pipeline.enqueue(tag, &command));
    let mut completed = 0;
    let mut run = |commands: u64| {
        let until = completed + commands;
        while completed < until {
            pipeline.wait(&mut completions, Duration::from_secs(1));
            for Completion { tag, outcome } in completions.drain(..) {
                outcome.expect("nothing fails here");
                completed += 1;
                pipeline.enqueue(tag, &command);
            }
        }
    };
    PART.set(Part::Client);
    run(plan.warm_up_commands);
    let allocations = counted(|| run(plan.commands));
    PART.set(Part::Program);
    // What came together went into one batch, roughly.
    let batches = plan.commands / in_flight as u64;
    Ok(Row {
        name: format!("{backend:?}").to_lowercase(),
        in_flight,
        allocations,
        commands: plan.commands,
        batches,
    })
}

fn print(title: &str, rows: &[Row]) {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY);
    let heads =
        [title, "in flight", "per command", "per batch: client", "leader", "both followers", "elsewhere"];
    table.set_header(heads);
    for row in rows {
        let [program, client, leader, followers] = row.allocations;
        let per = |count: u64, of: u64| format!("{:.3}", count as f64 / of as f64);
        let per_batch = |count| per(count, row.batches);
        let figures = [
            row.in_flight.to_string(),
            per(client + leader + followers, row.commands),
            per_batch(client),
            per_batch(leader),
            per_batch(followers),
            per_batch(program),
        ];
        let figures = figures.map(|figure| Cell::new(figure).set_alignment(CellAlignment::Right));
        table.add_row(std::iter::once(Cell::new(&row.name)).chain(figures));
    }
    println!("{table}\n");
}

fn main() -> anyhow::Result<()> {
    let ways = [Way::Pipeline, Way::Futures].into_iter();
    let rows: Vec<Row> = ways.flat_map(|way| IN_FLIGHT.map(|in_flight| in_memory(way, in_flight))).collect();
    print("in memory", &rows);
    // With one in flight a batch is a command.
    let allocates =
        |row: &&Row| row.allocations[1..].iter().sum::<u64>() as f64 > PER_BATCH_MAX * row.batches as f64;
    let guilty: Vec<String> =
        rows.iter().filter(allocates).map(|row| format!("{}, {}", row.name, row.in_flight)).collect();
    if is_measuring() {
        let mut rows = Vec::new();
        for backend in [Backend::Uring, Backend::Glommio] {
            for in_flight in IN_FLIGHT {
                match on_loopback(backend, in_flight) {
                    Ok(row) => rows.push(row),
                    Err(error) => println!("{backend:?}: {error:#}"),
                }
            }
        }
        print("on loopback", &rows);
    }
    ensure!(guilty.is_empty(), "batches allocate: {}", guilty.join("; "));
    Ok(())
}
