//! `ringraft wal` on the directory of a real node: clean, torn, damaged, live.

use ringraft_block::{AlignedBuf, BlockBuf as _, LogIndex, Pool, Term};
use ringraft_wal::format::{
    BatchBuilder, BatchKind, Chain, ENVELOPE_BYTES, Envelope, Seal, read_segment_header, write_envelope,
};
use serde_json::Value;
use std::fs::File;
use std::io::BufRead as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

fn ringraft() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringraft"));
    command.stdin(Stdio::null()).env_remove("RUST_LOG");
    command
}

const SMALL: [&str; 8] =
    ["--command-kb", "64", "--batch-kb", "64", "--segment-mb", "4", "--segments-ahead", "2"];

/// A data directory that a real node has filled and left in good order.
struct Filled {
    _above: tempfile::TempDir,
    dir: PathBuf,
}

fn filled() -> Filled {
    let above = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut bench = ringraft();
    bench.args(["bench", "--keep", "--nodes", "1", "--no-limit", "--json", "-", "--dir"]).arg(above.path());
    bench
        .args(["--duration", "200ms", "--warmup", "50ms", "--payload", "3000", "--in-flight", "8"])
        .args(SMALL);
    let output = bench.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let dir = directory_with("hard-a", above.path()).expect("the node's directory was kept");
    Filled { _above: above, dir }
}

fn directory_with(name: &str, above: &Path) -> Option<PathBuf> {
    for entry in std::fs::read_dir(above).ok()?.flatten() {
        let path = entry.path();
        if path.file_name().is_some_and(|file| file == name) {
            return path.parent().map(Path::to_owned);
        }
        if let Some(found) = path.is_dir().then(|| directory_with(name, &path)).flatten() {
            return Some(found);
        }
    }
    None
}

fn wal(verb: &str, dir: &Path, more: &[&str]) -> Output {
    ringraft().args(["wal", verb]).arg(dir).args(more).output().unwrap()
}

fn document(output: &Output) -> Value {
    let told = String::from_utf8_lossy(&output.stderr);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("no JSON ({error}): {told}"))
}

/// The batches of the log, as `dump` tells them.
fn batches(dir: &Path) -> Vec<Value> {
    let output = wal("dump", dir, &["--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout.lines().map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect()
}

fn number(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or_else(|| panic!("no {key} in {value}"))
}

fn writable(dir: &Path, batch: &Value) -> File {
    File::options().read(true).write(true).open(dir.join(batch["segment"].as_str().unwrap())).unwrap()
}

#[test]
fn a_clean_directory_is_told_as_it_is_and_stays_as_it_was() {
    let filled = filled();
    let before = content_of(&filled.dir);
    let verified = wal("verify", &filled.dir, &["--json", "--explain"]);
    assert_eq!(verified.status.code(), Some(0), "{}", String::from_utf8_lossy(&verified.stdout));
    let document = document(&verified);
    assert_eq!(document["state"], "clean");
    assert_eq!(document["held_by"], Value::Null);
    assert_eq!(document["findings"].as_array().unwrap().len(), 0, "{document}");
    assert_eq!(document["hard_state"][0]["state"], "valid");

    let batches = batches(&filled.dir);
    assert_eq!(number(&document["recovery"], "batches"), batches.len() as u64);
    let ends: Vec<u64> = batches.iter().map(|batch| number(batch, "last")).collect();
    let firsts: Vec<u64> = batches.iter().map(|batch| number(batch, "first")).collect();
    assert_eq!(firsts[0], 1);
    assert!(
        firsts[1..].iter().zip(&ends).all(|(first, end)| *first == end + 1),
        "the batches follow each other"
    );
    assert_eq!(document["recovery"]["last_index"].as_u64(), ends.last().copied());

    let text = wal("inspect", &filled.dir, &["--explain"]);
    assert!(text.status.success());
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(
        text.contains("state: clean") && text.contains("row 3") && text.contains("incarnation"),
        "{text}"
    );

    let one = wal("dump", &filled.dir, &["--from", "2", "--to", "2", "--commands"]);
    let one = String::from_utf8(one.stdout).unwrap();
    assert_eq!(one.lines().filter(|line| line.contains("segment-")).count(), 1, "{one}");
    assert!(one.contains("(3000 bytes)"), "{one}");
    assert_eq!(content_of(&filled.dir), before, "nothing was changed");
}

#[test]
fn a_flipped_bit_is_damage_with_its_place() {
    let filled = filled();
    let batches = batches(&filled.dir);
    let batch = &batches[batches.len() / 2];
    let at = number(batch, "offset") + ENVELOPE_BYTES as u64 + 5 * 512 + 77;
    let file = writable(&filled.dir, batch);
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();

    let verified = wal("verify", &filled.dir, &["--json", "--explain"]);
    assert_eq!(verified.status.code(), Some(20));
    let document = document(&verified);
    assert_eq!(document["state"], "damaged");
    let finding = &document["findings"][0];
    assert_eq!(finding["offset"], batch["offset"]);
    assert_eq!(finding["segment"], batch["segment"]);
    assert_eq!(finding["first"], batch["first"]);
    assert!(finding["what"].as_str().unwrap().contains("[5]"), "{finding}");
    assert_eq!(document["recovery"]["damage"].as_array().unwrap().len(), 1, "{document}");
    let told = String::from_utf8_lossy(&verified.stderr);
    assert!(told.contains("damaged"), "{told}");
}

#[test]
fn a_torn_end_is_no_damage() {
    let end_of = |last: &Value| number(last, "offset") + number(last, "bytes");
    // By chance the last batch ends with its segment, and the next one would begin another.
    let has_room = |filled: &Filled| {
        let batches = batches(&filled.dir);
        end_of(batches.last().unwrap()) + 4096
            <= writable(&filled.dir, batches.last().unwrap()).metadata().unwrap().len()
    };
    let filled = (0..10).map(|_| filled()).find(has_room).expect("a log that ends within a segment");
    let batches = batches(&filled.dir);
    let last = batches.last().unwrap();
    let end = end_of(last);
    let file = writable(&filled.dir, last);
    let mut header = [0; 4096];
    file.read_exact_at(&mut header, 0).unwrap();
    let header = read_segment_header(&header).unwrap();

    // The next batch, as the node would have written it, of which three sectors arrived.
    let mut chain = [0; 16];
    let text = last["chain"].as_str().unwrap();
    for (ordinal, byte) in chain.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * ordinal..2 * ordinal + 2], 16).unwrap();
    }
    let pool: Pool<AlignedBuf> = Pool::new(0);
    let block = pool.take(16 * 1024, |bytes| Ok::<_, ()>(AlignedBuf::zeroed(bytes))).unwrap();
    let mut builder = BatchBuilder::new(block);
    builder.push(&[7; 3000], None).unwrap();
    let (mut block, info) = builder.seal(Seal {
        group: header.group,
        term: Term(number(last, "term")),
        first: LogIndex(number(last, "last") + 1),
        kind: BatchKind::Commands,
        time_ms: u64::MAX,
        previous_chain: Chain(chain),
    });
    let envelope = Envelope {
        cluster: header.cluster,
        nonce: header.nonce,
        generation: header.generation,
        group: header.group,
        offset: end,
        epoch: header.epoch,
        boot: header.boot,
        durable_through: LogIndex(number(last, "last")),
        term: info.term,
        first: info.first,
        last: info.last,
        chain: info.chain,
        image_bytes: info.image_bytes,
    };
    write_envelope(block.buffer_mut().bytes_mut(), &envelope);
    file.write_all_at(&block.buffer().bytes()[..3 * 512], end).unwrap();

    let verified = wal("verify", &filled.dir, &["--json", "--explain"]);
    let document = document(&verified);
    assert_eq!(verified.status.code(), Some(21), "{document}");
    assert_eq!(document["state"], "torn_tail");
    assert_eq!(document["recovery"]["last_index"], last["last"]);
    assert!(number(&document["recovery"], "torn_bytes") > 0);
    let all = wal("dump", &filled.dir, &["--all"]);
    assert!(
        String::from_utf8_lossy(&all.stdout).contains("[not accepted"),
        "the torn batch is shown when asked for"
    );

    // The rest of it arrives: now it is a batch of the log.
    let whole = info.slot_bytes();
    file.write_all_at(&block.buffer().bytes()[..whole], end).unwrap();
    let verified = wal("verify", &filled.dir, &["--json"]);
    assert_eq!(verified.status.code(), Some(0));
}

/// A process that is killed when the test ends early.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_live_directory_is_read_and_left_alone() {
    let above = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let dir = above.path().join("data");
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut node = ringraft();
    node.args(["node", "--cluster", "c1", "--stop-with-stdin", "--id", "1", "--dir"]).arg(&dir);
    node.args(["--members", &format!("1=127.0.0.1:{port}"), "--control"]).args(SMALL);
    node.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut node = Running(node.spawn().unwrap());
    let pid = node.0.id();
    let mut said = std::io::BufReader::new(node.0.stdout.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    assert!(line.contains("ready"), "the node says that it is up, not {line:?}");

    let verified = wal("verify", &dir, &["--json"]);
    let document = document(&verified);
    assert_eq!(document["held_by"].as_u64(), Some(u64::from(pid)), "{document}");
    assert_ne!(document["state"], "damaged", "{document}");

    drop(node.0.stdin.take());
    assert!(node.0.wait().unwrap().success());
    let verified = wal("verify", &dir, &["--json"]);
    assert_eq!(verified.status.code(), Some(0), "{}", String::from_utf8_lossy(&verified.stdout));
}

#[test]
fn what_is_no_data_directory_is_refused() {
    let empty = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let output = wal("inspect", empty.path(), &[]);
    assert_eq!(output.status.code(), Some(10));
    assert!(String::from_utf8_lossy(&output.stderr).contains("not the data directory"));
    let output = wal("verify", &empty.path().join("missing"), &[]);
    assert_eq!(output.status.code(), Some(1));

    // Both copies of the hard state gone above segments: the node must not start.
    let filled = filled();
    std::fs::remove_file(filled.dir.join("hard-a")).unwrap();
    std::fs::write(filled.dir.join("hard-b"), [9; 4096]).unwrap();
    let output = wal("verify", &filled.dir, &["--explain"]);
    assert_eq!(output.status.code(), Some(20));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("would refuse") && text.contains("wipe the directory"), "{text}");
}

/// Names and bytes of all files.
fn content_of(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), std::fs::read(path).unwrap()))
        .collect();
    files.sort();
    files
}
