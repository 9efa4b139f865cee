//! How many instructions a command costs, and where: of the leader, of both followers, and of whoever proposes, without the
//! kernel's. Three members in memory (`members`) run under valgrind's callgrind, which counts each instruction: so the figures are
//! alike on every machine and whatever else it does, and small changes show.
//!
//! An instruction counts for the innermost function of this workspace that it was written in or is called from, inlined or not:
//! what the allocator or a copy costs is the cost of whoever asked for it. Files and functions are gathered to stages below.
//!
//! `cargo bench -p ringraft-bench --bench instructions`; `RINGRAFT_INSTRUCTIONS_SHOWN=40` also lists the dearest functions. Needs
//! valgrind and addr2line.

mod members;

use anyhow::{Context as _, bail, ensure};
use comfy_table::{Cell, CellAlignment, Table, presets};
use members::{Counts, IN_FLIGHT, Load, Members, Way, is_measuring, steady};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

/// Set for the program that is counted: how many commands are in flight.
const COUNTED: &str = "RINGRAFT_INSTRUCTIONS_OF";

/// Where the sources of the workspace are.
const OURS: [&str; 4] = ["/engine/src/", "/wal/", "/net/src/", "/bench/benches/"];

/// A stage in the life of a command: where in the workspace, and which functions there if not all, the first that fits.
struct Stage {
    name: &'static str,
    places: &'static [(&'static str, &'static str)],
}

const STAGES: &[Stage] = &[
    Stage { name: "(the program itself)", places: &[("/bench/benches/", "")] },
    Stage {
        name: "crc and chain",
        places: &[("block/src/checksum.rs", ""), ("image.rs", "checksum"), ("image.rs", "chain_of")],
    },
    Stage {
        name: "propose",
        places: &[
            ("ingress.rs", "push"),
            ("ingress.rs", "pop"),
            ("handle.rs", "submit"),
            ("handle.rs", "propose"),
            ("handle.rs", "enqueue"),
            ("handle.rs", "flush"),
            ("outcomes.rs", "spare"),
            ("outcomes.rs", "take_back"),
            ("group.rs", "push"),
            ("group.rs", "rest"),
            ("group.rs", "next"),
            ("group.rs", "new"),
            ("group.rs", "advance"),
            ("group.rs", "left"),
            ("group.rs", "cost"),
            ("group.rs", "give_back"),
            ("group.rs", "is_full"),
            ("group.rs", "clear"),
            ("tickets.rs", "push"),
            ("runtime/park.rs", ""),
            ("proposals.rs", "take"),
            ("proposals.rs", "admit"),
            ("proposals.rs", "push_open"),
            ("proposals.rs", "copy_into_open"),
            ("proposing.rs", "take_proposals"),
            ("image.rs", "push"),
            ("image.rs", "image_bytes_for"),
            ("image.rs", "table_bytes_for"),
        ],
    },
    Stage {
        name: "complete",
        places: &[
            ("ingress.rs", ""),
            ("handle.rs", ""),
            ("outcomes.rs", ""),
            ("answer.rs", ""),
            ("group.rs", ""),
            ("tickets.rs", ""),
            ("proposals.rs", "applied"),
            ("state_machine.rs", "take"),
        ],
    },
    Stage {
        name: "encode",
        places: &[
            ("image.rs", "seal"),
            ("proposals.rs", ""),
            ("proposing.rs", "propose"),
            ("proposing.rs", "seal"),
            ("clock.rs", ""),
        ],
    },
    Stage {
        name: "apply",
        places: &[
            ("apply.rs", ""),
            ("proposing.rs", "apply"),
            ("state_machine.rs", ""),
            ("image.rs", "commands"),
            ("image.rs", "trusted"),
            ("image.rs", "entry"),
            ("recent.rs", ""),
        ],
    },
    Stage { name: "verify", places: &[("/format/image.rs", "")] },
    Stage { name: "append", places: &[("/wal/", ""), ("driver/log.rs", ""), ("driver/stages.rs", "")] },
    Stage {
        name: "send",
        places: &[
            ("outbound.rs", ""),
            ("outbox.rs", ""),
            ("peers.rs", "send"),
            ("peers.rs", "queue"),
            ("peers.rs", "complete"),
            ("peers.rs", "encoded"),
            ("wire.rs", "encode"),
            ("frame.rs", "encode"),
            ("network.rs", "send"),
            ("network.rs", "sent"),
            ("network.rs", "flush"),
        ],
    },
    Stage { name: "receive", places: &[("/net/src/", ""), ("peers.rs", ""), ("wire.rs", "")] },
    Stage { name: "consensus: ack, commit", places: &[("/engine/src/raft/", "")] },
    Stage {
        name: "publish",
        places: &[
            ("driver.rs", "publish"),
            ("damage_status", ""),
            ("repair.rs", "status"),
            ("snapshots.rs", "status"),
        ],
    },
    Stage { name: "turns", places: &[("/engine/src/", "")] },
];

/// Where an instruction was written: the files and functions that it was inlined through, the innermost first.
type Frames = Vec<(String, String)>;

/// What callgrind has counted.
#[derive(Default)]
struct Profile {
    /// By function and address: its own instructions, and those of what it calls outside of the workspace.
    costs: BTreeMap<(String, u64), u64>,
    /// By caller and callee: all that the calls took.
    calls: BTreeMap<(String, String), u64>,
    total: u64,
}

/// Whether a function is of the workspace. A generic one of a library that was made for a type of it is.
fn is_ours(function: &str) -> bool {
    ["ringraft", "instructions"].iter().any(|name| function.contains(name))
}

/// Reads a profile with addresses and without abbreviations.
fn parse(text: &str) -> anyhow::Result<Profile> {
    let mut profile = Profile::default();
    let (mut function, mut callee) = (String::new(), String::new());
    let mut is_call = false;
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("fn=") {
            name.clone_into(&mut function);
        } else if let Some(name) = line.strip_prefix("cfn=") {
            name.clone_into(&mut callee);
        } else if line.starts_with("calls=") {
            is_call = true;
        } else if let Some(total) = line.strip_prefix("totals: ") {
            profile.total = total.trim().parse().context("the total")?;
        } else if let Some(position) = line.strip_prefix("0x") {
            let words: Vec<&str> = position.split(' ').collect();
            let [address, _line, cost] = words[..] else { bail!("not a cost: {line}") };
            let (address, cost) = (u64::from_str_radix(address, 16)?, cost.parse::<u64>()?);
            let outwards = is_call && !is_ours(&callee);
            if std::mem::take(&mut is_call) {
                *profile.calls.entry((function.clone(), callee.clone())).or_default() += cost;
                if !outwards {
                    continue;
                }
            }
            if is_ours(&function) {
                *profile.costs.entry((function.clone(), address)).or_default() += cost;
            }
        }
    }
    ensure!(profile.total > 0, "nothing was counted");
    Ok(profile)
}

/// Where the instructions at these addresses of the program were written.
fn locate(program: &Path, addresses: &BTreeSet<u64>) -> anyhow::Result<HashMap<u64, Frames>> {
    let mut child = Command::new("addr2line")
        .args(["--addresses", "--inlines", "--functions", "--demangle", "--exe"])
        .arg(program)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("addr2line, of the binutils")?;
    let mut input = child.stdin.take().context("its standard input")?;
    let asked: String = addresses.iter().map(|address| format!("{address:#x}\n")).collect();
    let writer = std::thread::spawn(move || input.write_all(asked.as_bytes()));
    let output = child.wait_with_output()?;
    writer.join().expect("it does not panic")?;
    let mut located: HashMap<u64, Frames> = HashMap::new();
    let (mut address, mut function) = (0, None);
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        match (line.strip_prefix("0x"), function.take()) {
            (Some(text), None) => address = u64::from_str_radix(text, 16)?,
            (_, None) => function = Some(line.to_owned()),
            (_, Some(function)) => located.entry(address).or_default().push((line.to_owned(), function)),
        }
    }
    Ok(located)
}

/// The stage that an instruction belongs to: by the innermost place in the workspace that is of one.
fn stage_of(frames: &[(String, String)]) -> Option<usize> {
    let (file, function) = frames.iter().find(|(file, _)| OURS.iter().any(|ours| file.contains(ours)))?;
    let own = last_name(function);
    let holds = |(place, name): &(&str, &str)| file.contains(place) && own.contains(name);
    STAGES.iter().position(|stage| stage.places.iter().any(holds))
}

/// A function's own name: without its path, and without types.
fn last_name(function: &str) -> String {
    let (mut depth, mut before) = (0_u32, ' ');
    let mut plain = String::new();
    for letter in function.chars() {
        match letter {
            '<' => depth += 1,
            // Not that of an arrow.
            '>' if before != '-' => depth = depth.saturating_sub(1),
            _ if depth == 0 => plain.push(letter),
            _ => {}
        }
        before = letter;
    }
    let mut names = plain.rsplit("::").filter(|name| !name.starts_with('{') && !is_hash(name));
    names.next().unwrap_or_default().to_owned()
}

/// What the compiler appends to a path.
fn is_hash(name: &str) -> bool {
    name.len() == 17 && name.starts_with('h') && name[1..].bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// What a run came to, and its instructions by stage, by part and by function.
struct Counted {
    counts: Counts,
    stages: Vec<u64>,
    parts: [(&'static str, u64); 3],
    functions: Vec<(String, u64)>,
}

/// Runs this program under callgrind.
fn counted(in_flight: usize) -> anyhow::Result<Counted> {
    let program = std::env::current_exe()?;
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let profile = directory.path().join("profile");
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--tool=callgrind", "--dump-instr=yes", "--compress-strings=no", "--compress-pos=no"]);
    valgrind.arg("--toggle-collect=*instructions*counts_from_here*");
    valgrind.arg(format!("--callgrind-out-file={}", profile.display()));
    // Valgrind counts a repeated instruction as often as it is repeated, and each byte of a copy is no instruction.
    let thresholds = ["x86_rep_movsb_threshold", "x86_rep_stosb_threshold"];
    let never = thresholds.map(|threshold| format!("glibc.cpu.{threshold}={}", 1_u64 << 40)).join(":");
    valgrind.env("GLIBC_TUNABLES", never);
    let output = valgrind.arg(&program).arg("--bench").env(COUNTED, in_flight.to_string()).output();
    let output = output.context("valgrind")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said = String::from_utf8_lossy(&output.stdout);
    let numbers: Vec<u64> = said.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    let [commands, batches, leader_turns, followers_turns] = numbers[..] else { bail!("it said {said}") };
    let counts = Counts { commands, batches, leader_turns, followers_turns };

    let profile = parse(&std::fs::read_to_string(&profile)?)?;
    let addresses = profile.costs.keys().map(|(_, address)| *address).collect();
    let places = locate(&program, &addresses)?;
    let mut stages = vec![0; STAGES.len() + 1];
    let mut functions: BTreeMap<String, u64> = BTreeMap::new();
    for ((function, address), cost) in &profile.costs {
        let frames = places.get(address).map_or(&[][..], |frames| frames);
        let stage = stage_of(frames).unwrap_or(STAGES.len());
        stages[stage] += cost;
        let named = frames.iter().find(|(file, _)| OURS.iter().any(|ours| file.contains(ours)));
        let (file, name) =
            named.map_or(("?", function.as_str()), |(file, name)| (file.as_str(), name.as_str()));
        let file = file.rsplit('/').next().unwrap_or(file).split(':').next().unwrap_or(file);
        let stage = STAGES.get(stage).map_or("(elsewhere)", |stage| stage.name);
        *functions.entry(format!("{stage}: {file} {}", last_name(name))).or_default() += cost;
    }
    let mut functions: Vec<_> = functions.into_iter().collect();
    functions.sort_by_key(|(_, cost)| std::cmp::Reverse(*cost));
    let part = |name: &str| {
        let of_it = profile.calls.iter().filter(|((_, callee), _)| callee.contains(name));
        of_it.map(|(_, cost)| *cost).sum()
    };
    let parts = [
        ("client", part("Load::turn")),
        ("leader", part("members::leader")),
        ("both followers", part("members::follower")),
    ];
    Ok(Counted { counts, stages, parts, functions })
}

/// What is counted: `counts_from_here` and all that it calls.
#[inline(never)]
fn counts_from_here(members: &mut Members, load: &mut Load, commands: u64) {
    members.run(load, commands);
}

/// What was done for the commands that count.
fn run(in_flight: usize) -> Counts {
    let plan = steady(in_flight);
    let mut members = Members::new(|_| {});
    let mut load = members.load(Way::Pipeline, in_flight);
    members.run(&mut load, plan.warm_up_commands);
    let before = members.counts();
    counts_from_here(&mut members, &mut load, plan.commands);
    let after = members.counts();
    Counts {
        commands: after.commands - before.commands,
        batches: after.batches - before.batches,
        leader_turns: after.leader_turns - before.leader_turns,
        followers_turns: after.followers_turns - before.followers_turns,
    }
}

fn main() -> anyhow::Result<()> {
    if let Ok(in_flight) = std::env::var(COUNTED) {
        let Counts { commands, batches, leader_turns, followers_turns } = run(in_flight.parse()?);
        println!("{commands} {batches} {leader_turns} {followers_turns}");
        return Ok(());
    }
    if !is_measuring() {
        IN_FLIGHT.into_iter().for_each(|in_flight| println!("{in_flight}: {:?}", run(in_flight)));
        return Ok(());
    }
    let counted = IN_FLIGHT.map(counted);
    let [one, some, many] = counted;
    let all = [one?, some?, many?];
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY);
    let heads = IN_FLIGHT.map(|in_flight| format!("{in_flight} in flight"));
    table.set_header(std::iter::once("instructions per command".to_owned()).chain(heads));
    let mut row = |name: &str, of: &dyn Fn(&Counted) -> f64| {
        let figures = all.iter().map(|counted| format!("{:.1}", of(counted)));
        let figures = figures.map(|figure| Cell::new(figure).set_alignment(CellAlignment::Right));
        table.add_row(std::iter::once(Cell::new(name)).chain(figures));
    };
    let per_command = |counted: &Counted, cost: u64| cost as f64 / counted.counts.commands as f64;
    let per_batch = |counted: &Counted, count: u64| count as f64 / counted.counts.batches as f64;
    // Not the first, which is this program.
    for (at, stage) in STAGES.iter().enumerate().skip(1) {
        row(stage.name, &|counted| per_command(counted, counted.stages[at]));
    }
    row("elsewhere", &|counted| per_command(counted, counted.stages[STAGES.len()]));
    row("together", &|counted| per_command(counted, counted.stages[1..].iter().sum()));
    for at in 0..3 {
        let (name, _) = all[0].parts[at];
        row(&format!("{name}, this program's share included"), &|counted| {
            per_command(counted, counted.parts[at].1)
        });
    }
    row("turns of the leader per batch", &|counted| per_batch(counted, counted.counts.leader_turns));
    row("turns of both followers per batch", &|counted| per_batch(counted, counted.counts.followers_turns));
    println!("{table}");
    let shown =
        std::env::var("RINGRAFT_INSTRUCTIONS_SHOWN").ok().and_then(|number| number.parse().ok()).unwrap_or(0);
    for (in_flight, counted) in IN_FLIGHT.into_iter().zip(&all) {
        for (function, cost) in counted.functions.iter().take(shown) {
            println!("{in_flight} in flight: {:9.1}  {function}", per_command(counted, *cost));
        }
    }
    Ok(())
}
