//! The program as its users meet it: small benchmarks from end to end, and every wrong input with its error and its
//! exit code. Nothing here depends on how fast the machine is.

use serde_json::Value;
use std::ffi::CString;
use std::io::{BufRead as _, BufReader, Lines};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Everything below waits at most this long for anything.
const WITHIN: Duration = Duration::from_secs(60);
/// Small segments: a data directory of a few MiB.
const SMALL: [&str; 8] =
    ["--command-kb", "64", "--batch-kb", "64", "--segment-mb", "4", "--segments-ahead", "2"];

/// A directory on the disk that the build is on: the system's temporary directory is often in memory.
fn on_disk() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn ringraft() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringraft"));
    command.stdin(Stdio::null()).env_remove("RUST_LOG");
    command
}

/// A small benchmark in `dir`.
fn bench(dir: &Path, more: &[&str]) -> Command {
    let mut command = ringraft();
    command.args(["bench", "--no-limit", "--json", "-", "--dir"]).arg(dir);
    command.args(["--duration", "300ms", "--warmup", "100ms", "--payload", "64"]).args(SMALL).args(more);
    command
}

/// One member that is a cluster by itself.
fn node(dir: &Path, id: u64, port: u16) -> Command {
    let mut command = ringraft();
    command.args(["node", "--cluster", "c1", "--stop-with-stdin", "--id", &id.to_string(), "--dir"]).arg(dir);
    command.args(["--members", &format!("{id}=127.0.0.1:{port}")]).args(SMALL);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

fn json(output: &Output) -> Value {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{:?}\n{stderr}", output.status);
    serde_json::from_slice(&output.stdout).expect("the standard output holds only the JSON")
}

/// Processes that were started for `dir`: their command line names it.
fn processes_of(dir: &Path) -> Vec<u32> {
    let name = dir.as_os_str().as_encoded_bytes();
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let started_for = |id: &u32| {
        let line = std::fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
        line.windows(name.len()).any(|window| window == name)
    };
    ids.filter(started_for).collect()
}

fn nothing_is_left(dir: &Path) {
    assert_eq!(processes_of(dir), [0; 0]);
    assert_eq!(std::fs::read_dir(dir).unwrap().count(), 0);
}

/// Waits until `condition` holds.
fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + WITHIN;
    while !condition() {
        assert!(Instant::now() < deadline, "not {what} within {WITHIN:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits for the end of `child` and reads what it said.
fn output_of(mut child: Child) -> Output {
    drop(child.stdin.take());
    child.wait_with_output().unwrap()
}

/// A process that is killed when the test ends early.
struct Guard(Option<Child>);

impl Guard {
    fn spawn(mut command: Command) -> Self {
        Self(Some(command.spawn().unwrap()))
    }

    fn take(mut self) -> Child {
        self.0.take().unwrap()
    }

    fn child(&mut self) -> &mut Child {
        self.0.as_mut().unwrap()
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Starts a node and waits until its log exists and it runs.
fn running_node(dir: &Path, id: u64, port: u16) -> Guard {
    let mut command = node(dir, id, port);
    command.arg("--control");
    let mut guard = Guard::spawn(command);
    let mut line = String::new();
    BufReader::new(guard.child().stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    if !line.contains("ready") {
        let output = output_of(guard.take());
        panic!("not ready: {line}{}", String::from_utf8_lossy(&output.stderr));
    }
    guard
}

fn fails(mut command: Command, code: i32, said: &[&str]) {
    let output = command.stdout(Stdio::piped()).stderr(Stdio::piped()).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{command:?}: {:?}\n{stderr}", output.status);
    assert_eq!(stderr.matches("error: ").count(), 1, "{stderr}");
    for word in said {
        assert!(stderr.contains(word), "{word} is missing: {stderr}");
    }
}

#[test]
fn a_small_benchmark_prints_every_key_verifies_and_leaves_nothing() {
    let dir = on_disk();
    let report = json(&bench(dir.path(), &["--in-flight", "8"]).output().unwrap());
    let keys: [(&str, &[&str]); 15] = [
        ("schema", &[]),
        ("environment", &["kernel", "cpu", "cpus", "file_system"]),
        ("config", &["nodes", "payload_bytes", "in_flight", "engine"]),
        ("durable", &["acknowledgement", "seen"]),
        ("commits_per_s", &[]),
        ("payload_bytes_per_s", &[]),
        ("latency_us", &["p50", "p90", "p99", "p999", "max"]),
        ("cpu_us_per_commit", &[]),
        ("disk_bytes_per_payload_byte", &[]),
        ("batch", &["entries_mean", "bytes_mean"]),
        ("limit", &[]),
        ("share_of_limit", &[]),
        ("verified", &["ok", "acked", "present", "chains_equal"]),
        ("failover", &[]),
        ("notes", &[]),
    ];
    for (key, inner) in keys {
        let value = report.get(key).unwrap_or_else(|| panic!("no {key}"));
        for inner in inner {
            assert!(value.get(inner).is_some_and(|value| !value.is_null()), "no {key}.{inner}");
        }
    }
    let verified = &report["verified"];
    assert_eq!(verified["ok"], true, "{verified}");
    assert!(verified["acked"].as_u64().unwrap() > 0, "{verified}");
    assert_eq!(verified["acked"], verified["present"], "{verified}");
    assert_eq!(report["durable"]["seen"], true, "{report}");
    let seen = report["durable"]["durable_files_seen"].as_array().unwrap();
    assert!(seen.len() == 3 && seen.iter().all(|files| files.as_u64() > Some(0)), "{seen:?}");
    assert!(report["latency_us"]["p50"].as_f64() <= report["latency_us"]["max"].as_f64());
    nothing_is_left(dir.path());
}

#[test]
fn every_kind_of_load_and_number_of_nodes_verifies() {
    for more in [
        &["--in-flight", "1", "--load", "core"][..],
        &["--in-flight", "64", "--load", "core"],
        &["--in-flight", "64", "--nodes", "1"],
        &["--in-flight", "16", "--nodes", "5"],
        &["--rate", "500"],
        &["--rate", "500", "--load", "core"],
        &["--in-flight", "4", "--payload", "16"],
        // Too large to share a batch.
        &["--in-flight", "4", "--payload", "65536"],
    ] {
        let dir = on_disk();
        let report = json(&bench(dir.path(), more).output().unwrap());
        let verified = &report["verified"];
        assert_eq!(verified["ok"], true, "{more:?} {verified}");
        assert!(verified["acked"].as_u64().unwrap() > 0, "{more:?} {verified}");
        nothing_is_left(dir.path());
    }
}

#[test]
fn the_limit_is_measured_before_and_after_and_results_go_to_files() {
    let dir = on_disk();
    let files = on_disk();
    let (json, hgrm) = (files.path().join("result.json"), files.path().join("latency.hgrm"));
    let mut command = ringraft();
    command.args(["bench", "--duration", "300ms", "--warmup", "100ms", "--dir"]).arg(dir.path()).args(SMALL);
    command.arg("--json").arg(&json).arg("--hgrm").arg(&hgrm);
    let output = command.output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{stderr}");
    assert!(stdout.contains("share of limit") && stdout.contains("Verified from disk"), "{stdout}");
    assert!(stdout.contains("durable (O_DIRECT | O_DSYNC) on 2 of 3 nodes"), "{stdout}");
    let report: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    for key in ["flush_us_p50", "rtt_us_p50", "commit_us_p50", "bytes_per_s"] {
        assert!(report["limit"][key].as_f64() > Some(0.0), "{key}");
        assert!(report["limit_before"][key].as_f64() > Some(0.0), "{key}");
        assert!(report["limit_after"][key].as_f64() > Some(0.0), "{key}");
    }
    for key in ["latency", "throughput"] {
        assert!(report["share_of_limit"][key].as_f64() > Some(0.0), "{key}");
    }
    assert!(std::fs::read_to_string(hgrm).unwrap().contains("1/(1-Percentile)"));
    nothing_is_left(dir.path());
}

#[test]
fn when_the_leader_is_killed_another_goes_on_and_the_logs_verify() {
    for more in [&["--load", "thread"][..], &["--load", "core"], &["--restart-killed", "false"]] {
        let dir = on_disk();
        let mut command = bench(dir.path(), more);
        command.args(["--in-flight", "32", "--duration", "3s", "--kill-leader-after", "500ms"]);
        let report = json(&command.output().unwrap());
        assert_eq!(report["verified"]["ok"], true, "{more:?} {report}");
        let leaders = report["leaders"].as_array().unwrap();
        assert!(leaders.len() >= 2, "{leaders:?}");
        assert_eq!(leaders[0]["ended"], "killed", "{leaders:?}");
        assert!(leaders[1]["acked"].as_u64() > Some(0), "{leaders:?}");
        assert!(report["failover"]["gap_ms"].as_f64() > Some(0.0), "{report}");
        // More than the leader's first, empty batch: what the killed one reported while it lived is kept, too.
        let nodes = report["verified"]["nodes"].as_array().unwrap();
        assert!(nodes.len() == 3 && nodes.iter().all(|node| node["kept"].as_u64() > Some(1)), "{nodes:?}");
        nothing_is_left(dir.path());
    }
}

#[test]
fn behind_snapshots_the_log_is_purged_and_what_is_left_of_it_verifies() {
    for more in [&[][..], &["--kill-leader-after", "800ms"]] {
        // Nodes retain some log for whoever is behind. A slow disk takes longer to write more than that.
        let purged = ["2s", "10s", "60s"].iter().any(|duration| {
            let dir = on_disk();
            let mut command = bench(dir.path(), &["--snapshot-mb", "2", "--in-flight", "16"]);
            command.args(["--payload", "16384", "--duration", duration]).args(more);
            let report = json(&command.output().unwrap());
            let verified = &report["verified"];
            assert_eq!(verified["ok"], true, "{report}");
            let count = |name: &str| verified[name].as_u64().unwrap();
            assert!(count("present") > 0 && count("counted") >= 2, "{verified}");
            nothing_is_left(dir.path());
            count("purged") > 0
        });
        assert!(purged, "{more:?}: nothing was ever purged");
    }
}

/// The story: the timetable began anew with each leader, so what fell due in the gap of a failover was never sent, and
/// the latencies did not show that there had been one.
#[test]
fn what_falls_due_during_a_failover_is_sent_late_and_its_latency_counts() {
    for load in ["thread", "core"] {
        let dir = on_disk();
        let mut command = bench(dir.path(), &["--rate", "500", "--load", load]);
        command.args(["--duration", "4s", "--kill-leader-after", "500ms"]);
        let report = json(&command.output().unwrap());
        assert_eq!(report["verified"]["ok"], true, "{report}");
        assert!(report["leaders"].as_array().unwrap().len() >= 2, "{report}");
        let gap_us = report["failover"]["gap_ms"].as_f64().unwrap() * 1e3;
        let max_us = report["latency_us"]["max"].as_f64().unwrap();
        // What had been sent when the leader was killed is of unknown outcome; what was due next waited for the rest
        // of the gap, which is nearly all of it.
        assert!(max_us > gap_us / 2.0, "the gap was {gap_us} µs, the latency at most {max_us} µs");
        let outcome = |name: &str| report["outcomes"][name].as_u64().unwrap();
        // 4 s and the warm-up's 100 ms.
        assert_eq!(outcome("due"), 2050);
        assert_eq!(outcome("missed"), 2050 - outcome("acked").min(2050));
        nothing_is_left(dir.path());
    }
}

#[test]
fn an_interrupted_benchmark_leaves_nothing() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let dir = on_disk();
        let mut command = bench(dir.path(), &["--in-flight", "8"]);
        command.args(["--duration", "300s"]).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut guard = Guard::spawn(command);
        let own = guard.child().id();
        wait_until("running", || processes_of(dir.path()).len() == 4);
        // SAFETY: `own` is the id of a child that has not been waited for.
        assert_eq!(unsafe { libc::kill(own as i32, signal) }, 0);
        let output = output_of(guard.take());
        assert_eq!(output.status.code(), Some(128 + signal), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.stdout, b"");
        nothing_is_left(dir.path());
    }
}

#[test]
fn the_nodes_of_a_killed_benchmark_end_with_it() {
    let dir = on_disk();
    let mut command = bench(dir.path(), &["--in-flight", "8"]);
    command.args(["--duration", "300s"]).stdout(Stdio::null()).stderr(Stdio::null());
    let guard = Guard::spawn(command);
    wait_until("running", || processes_of(dir.path()).len() == 4);
    drop(guard);
    wait_until("gone", || processes_of(dir.path()).is_empty());
}

#[test]
fn a_node_stops_in_good_order_on_a_signal_and_at_the_end_of_its_input() {
    let dir = on_disk();
    let port = free_port();
    for signal in [Some(libc::SIGTERM), Some(libc::SIGINT), None] {
        let mut guard = running_node(dir.path(), 1, port);
        if let Some(signal) = signal {
            // SAFETY: the id is that of a child that has not been waited for.
            assert_eq!(unsafe { libc::kill(guard.child().id() as i32, signal) }, 0);
            wait_until("stopped", || guard.child().try_wait().unwrap().is_some());
        }
        let output = output_of(guard.take());
        assert!(output.status.success(), "{signal:?} {output:?}");
    }
}

#[test]
fn a_node_says_nothing_on_its_standard_output() {
    let dir = on_disk();
    let mut guard = Guard::spawn(node(dir.path(), 1, free_port()));
    wait_until("started", || std::fs::read_dir(dir.path()).unwrap().count() > 0);
    std::thread::sleep(Duration::from_millis(300));
    // SAFETY: the id is that of a child that has not been waited for.
    assert_eq!(unsafe { libc::kill(guard.child().id() as i32, libc::SIGTERM) }, 0);
    let output = output_of(guard.take());
    assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
}

#[test]
fn unknown_flags_and_contradictions_are_usage_errors() {
    let dir = on_disk();
    for (line, said) in [
        (&["bench", "--inflight", "3"][..], "--in-flight"),
        (&["bench", "--nodes", "4"], "1, 3 or 5"),
        (&["bench", "--payload", "15"], "16"),
        (&["bench", "--payload", "999999999"], "--payload"),
        (&["bench", "--duration", "10h"], "unit of time"),
        (&["bench", "--rate", "0"], "--rate"),
        (&["bench", "--segment-mb", "1"], "segment"),
        (&["bench", "--cores", "9999"], "9999"),
        (&["bench", "--kill-leader-after", "9s", "--duration", "1s"], "--kill-leader-after"),
        (&["node", "--id", "1", "--dir", "d"], "--members"),
        (&["node", "--id", "1", "--dir", "d", "--cluster", "1", "--members", "1:127.0.0.1:1"], "ID=ADDRESS"),
        (&["node", "--id", "2", "--dir", "d", "--cluster", "1", "--members", "1=127.0.0.1:1"], "member"),
        (&["node", "--id", "1", "--dir", "d", "--cluster", "1", "--members", "1=10.1.1.1:1"], "insecure"),
        (&["node", "--id", "1", "--dir", "d", "--cluster", "0", "--members", "1=127.0.0.1:1"], "cluster"),
        (&["brench"], "bench"),
    ] {
        let mut command = ringraft();
        command.args(line).current_dir(dir.path());
        fails(command, 2, &[said]);
    }
    nothing_is_left(dir.path());
}

#[test]
fn a_directory_in_memory_is_refused() {
    let memory = match tempfile::tempdir_in("/dev/shm") {
        Ok(dir) => dir,
        Err(error) => return eprintln!("skipped: no directory in /dev/shm: {error}"),
    };
    fails(bench(memory.path(), &[]), 11, &["in memory", "--dir"]);
    fails(node(&memory.path().join("data"), 1, free_port()), 11, &["tmpfs"]);
    assert!(std::fs::read_dir(memory.path()).unwrap().flatten().all(|entry| entry.path().ends_with("data")));
}

#[test]
fn a_directory_that_cannot_be_written_is_refused() {
    let dir = on_disk();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    fails(bench(&dir.path().join("absent"), &[]), 10, &["absent"]);
    fails(bench(&file, &[]), 10, &["file"]);
    fails(bench(Path::new("/proc"), &[]), 10, &["/proc"]);
    fails(node(&file, 1, free_port()), 10, &["file"]);
    fails(node(Path::new("/proc/ringraft"), 1, free_port()), 10, &["/proc/ringraft"]);
}

#[test]
fn a_port_in_use_is_refused_also_when_another_node_uses_it() {
    let dir = on_disk();
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    fails(node(&dir.path().join("a"), 1, port), 14, &[&port.to_string()]);
    drop(taken);
    let _running = running_node(&dir.path().join("b"), 1, port);
    fails(node(&dir.path().join("c"), 1, port), 14, &[&port.to_string()]);
}

#[test]
fn a_directory_of_another_node_or_cluster_is_refused() {
    let dir = on_disk();
    let port = free_port();
    let output = output_of(running_node(dir.path(), 1, port).take());
    assert!(output.status.success(), "{output:?}");
    fails(node(dir.path(), 2, port), 12, &["node"]);
    let mut another_cluster = node(dir.path(), 1, port);
    another_cluster.args(["--cluster", "c2"]);
    fails(another_cluster, 12, &["cluster"]);
}

#[test]
fn two_processes_on_one_directory_are_refused() {
    let dir = on_disk();
    let _running = running_node(dir.path(), 1, free_port());
    fails(node(dir.path(), 1, free_port()), 13, &[]);
}

#[test]
fn too_little_lockable_memory_is_refused_with_the_cure() {
    let dir = on_disk();
    let mut command = node(dir.path(), 1, free_port());
    // The other backend locks none.
    command.args(["--backend", "glommio"]);
    // SAFETY: only system calls are made between fork and exec.
    unsafe {
        command.pre_exec(|| {
            // Without these two capabilities (IPC_LOCK, SYS_RESOURCE) the limit holds for root too.
            for capability in [14, 24] {
                libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0);
            }
            let limit = libc::rlimit { rlim_cur: 64 << 10, rlim_max: 64 << 10 };
            match libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
    fails(command, 15, &["ulimit -l"]);
}

/// Makes io_uring_setup fail with `number`, as a container's seccomp profile does.
fn without_io_uring(command: &mut Command, number: i32) {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let call = libc::SYS_io_uring_setup as u32;
    let program = [
        // The first word of seccomp_data is the number of the system call.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        libc::sock_filter {
            code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
            jt: 0,
            jf: 1,
            k: call,
        },
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | number as u32),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    // SAFETY: only system calls are made between fork and exec; `program` moves into the closure and lives across
    // them.
    unsafe {
        command.pre_exec(move || {
            let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
            let set = libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &filter) == 0;
            if set { Ok(()) } else { Err(std::io::Error::last_os_error()) }
        });
    }
}

#[test]
fn a_refused_io_uring_is_named_with_the_cure() {
    let dir = on_disk();
    for (number, code, said) in [(libc::EPERM, 17, "seccomp"), (libc::ENOSYS, 18, "ENOSYS")] {
        let mut command = node(&dir.path().join(code.to_string()), 1, free_port());
        without_io_uring(&mut command, number);
        fails(command, code, &["io_uring", said]);
        // A benchmark passes on what its nodes say.
        let mut command = bench(dir.path(), &["--in-flight", "8"]);
        without_io_uring(&mut command, number);
        fails(command, code, &["io_uring", said]);
    }
}

/// Shows the sysctl kernel.io_uring_disabled with the content of `file` to `command` and those it starts: in a mount
/// namespace of their own, so that the machine's own value stays what it is.
fn with_sysctl(command: &mut Command, file: &Path) {
    let file = CString::new(file.as_os_str().as_encoded_bytes()).unwrap();
    let checked = |returned: i32| match returned {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    };
    // SAFETY: only system calls are made between fork and exec; the strings live across them.
    unsafe {
        command.pre_exec(move || {
            let none = std::ptr::null();
            checked(libc::unshare(libc::CLONE_NEWNS))
                .or_else(|_| checked(libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS)))?;
            let private = libc::MS_REC | libc::MS_PRIVATE;
            checked(libc::mount(none, c"/".as_ptr(), none, private, none.cast()))?;
            let sysctl = c"/proc/sys/kernel/io_uring_disabled".as_ptr();
            checked(libc::mount(file.as_ptr(), sysctl, none, libc::MS_BIND, none.cast()))
        });
    }
}

#[test]
fn an_io_uring_that_the_sysctl_disables_is_told_from_one_that_a_filter_refuses() {
    let dir = on_disk();
    let sysctl = dir.path().join("io_uring_disabled");
    for value in ["1", "2"] {
        std::fs::write(&sysctl, format!("{value}\n")).unwrap();
        let mut may = ringraft();
        with_sysctl(may.arg("--version").stdout(Stdio::null()), &sysctl);
        if let Err(error) = may.status() {
            return eprintln!("skipped: no mount namespace with another sysctl: {error}");
        }
        let said = format!("the sysctl kernel.io_uring_disabled is {value}");
        let mut node = node(&dir.path().join(value), 1, free_port());
        let mut bench = bench(dir.path(), &["--in-flight", "8"]);
        for command in [&mut node, &mut bench] {
            with_sysctl(command, &sysctl);
            without_io_uring(command, libc::EPERM);
        }
        fails(node, 16, &["io_uring", &said, "Set it to 0"]);
        fails(bench, 16, &["io_uring", &said, "Set it to 0"]);
    }
}

/// Where a replica's messages go.
fn log_of(dir: &Path, id: &str) -> PathBuf {
    dir.join(format!("{id}.log"))
}

/// Three replicas that a driver conducts, the last to be started is the first; and what that one says.
fn driven(
    dir: &Path,
    more: impl Fn(&str) -> Vec<&'static str>,
) -> (Vec<Guard>, Lines<BufReader<ChildStdout>>) {
    let ports: Vec<_> = (0..3).map(|_| free_port().to_string()).collect();
    let mut replicas = Vec::new();
    for id in ["3", "2", "1"] {
        let mut command = ringraft();
        command.args(["node", "--drive", "--id", id, "--ports", &ports.join(","), "--dir"]);
        command.arg(dir.join(id)).args(SMALL).args(more(id));
        std::fs::create_dir_all(dir).unwrap();
        // Not a pipe, which would be full some day.
        let log = std::fs::File::create(log_of(dir, id)).unwrap();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
        replicas.push(Guard::spawn(command));
    }
    let said = replicas[2].child().stdout.take().unwrap();
    let mut lines = BufReader::new(said).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "LEADER");
    (replicas, lines)
}

/// Their standard input ends: each stops in good order, and has said nothing more. Returns their logs, the first's last.
fn dismissed(dir: &Path, replicas: Vec<Guard>, lines: Lines<BufReader<ChildStdout>>) -> Vec<String> {
    let mut children: Vec<Child> = replicas.into_iter().map(Guard::take).collect();
    children.iter_mut().for_each(|child| drop(child.stdin.take()));
    let stopped = |(mut child, id): (Child, &str)| {
        let status = child.wait().unwrap();
        let said = std::fs::read_to_string(log_of(dir, id)).unwrap();
        assert!(status.success() && status.signal().is_none(), "{status:?} {said}");
        said
    };
    let logs = children.into_iter().zip(["3", "2", "1"]).map(stopped).collect();
    assert_eq!(lines.map(Result::unwrap).collect::<Vec<_>>(), [""; 0]);
    logs
}

#[test]
fn a_neutral_driver_can_drive_three_replicas() {
    let dir = on_disk();
    for (run, more) in [&["--load", "thread"], &["--load", "core"]].into_iter().enumerate() {
        let dir = dir.path().join(run.to_string());
        let (mut replicas, mut lines) = driven(&dir, |_| more.to_vec());
        let mut order = |order: &str| {
            use std::io::Write as _;
            let asked = Instant::now();
            writeln!(replicas[2].child().stdin.as_mut().unwrap(), "{order}").unwrap();
            assert_eq!(lines.next().unwrap().unwrap(), "BEGIN");
            let began = asked.elapsed();
            let line = lines.next().unwrap().unwrap();
            let result: Value = serde_json::from_str(line.strip_prefix("END ").unwrap()).unwrap();
            (result, began, asked.elapsed())
        };
        for payload in ["128", "4096"] {
            // On a busy machine nothing may come through in so short a time: then once more.
            let result = (0..50).find_map(|_| {
                let (result, began, ended) = order(&format!("bench {payload} 16 50 200"));
                assert!(began.as_millis() >= 50 && ended.as_millis() >= 250, "{began:?} {ended:?}");
                result["entries"].as_u64().filter(|entries| *entries > 0).map(|_| result)
            });
            let result = result.expect("something is committed");
            let [mean, p50, p99, p999] =
                ["mean_us", "p50_us", "p99_us", "p999_us"].map(|name| result[name].as_f64().unwrap());
            assert!(0.0 < p50 && p50 <= p99 && p99 <= p999 && mean <= p999, "{result}");
            assert_eq!(result["secs"], 0.2);
        }
        dismissed(&dir, replicas, lines);
    }
}

/// A replica that is driven for long does not fill its disk, and what a benchmark sees is the log's steady state.
#[test]
fn a_driven_replica_purges_its_log_behind_snapshots() {
    let dir = on_disk();
    // A leader whose disk does not answer for so long gives up its office, and its load ends: not on a machine that is only busy.
    let more = ["--snapshot-mb", "4", "--election-timeout", "3s"];
    let (mut replicas, mut lines) = driven(dir.path(), |_| more.to_vec());
    // Many times what the replicas' segments hold, in as many turns as this machine needs.
    let mut committed = 0;
    for _ in 0..1000 {
        use std::io::Write as _;
        writeln!(replicas[2].child().stdin.as_mut().unwrap(), "bench 16384 64 1 200").unwrap();
        let mut said = |word: &str| {
            let line = lines.next().and_then(Result::ok).unwrap_or_default();
            let log = || std::fs::read_to_string(log_of(dir.path(), "1")).unwrap();
            line.strip_prefix(word).unwrap_or_else(|| panic!("{line} {}", log())).to_owned()
        };
        said("BEGIN");
        let result: Value = serde_json::from_str(&said("END ")).unwrap();
        committed += 16384 * result["entries"].as_u64().unwrap();
        if committed >= 256 << 20 {
            break;
        }
    }
    let logs = dismissed(dir.path(), replicas, lines);
    for (id, log) in ["3", "2", "1"].into_iter().zip(logs) {
        let dir = dir.path().join(id);
        let files = || std::fs::read_dir(&dir).unwrap().map(Result::unwrap);
        let bytes: u64 = files().map(|file| file.metadata().unwrap().len()).sum();
        let has_snapshot = files().any(|file| file.path().extension().is_some_and(|kind| kind == "snap"));
        let dump = ringraft().args(["wal", "dump", "--json"]).arg(&dir).output().unwrap();
        let first: Value =
            serde_json::from_slice(dump.stdout.split(|byte| *byte == b'\n').next().unwrap()).unwrap();
        let is_purged = first["first"].as_u64().unwrap() > 1;
        let told = format!("{committed} B committed, {bytes} B in files, begins with {first}\n{log}");
        assert!(is_purged && has_snapshot && bytes < committed, "{id}: {told}");
    }
}

#[test]
fn a_driven_replica_that_was_elected_before_the_first_hands_over_to_it() {
    let dir = on_disk();
    let slow = ["--election-timeout", "5s", "--heartbeat-interval", "20ms"];
    let quick = ["--election-timeout", "60ms", "--heartbeat-interval", "20ms"];
    let more = |id: &str| if id == "1" { slow.to_vec() } else { quick.to_vec() };
    let (replicas, lines) = driven(dir.path(), more);
    let logs = dismissed(dir.path(), replicas, lines);
    let led = |log: &String| log.contains("role=Leader");
    assert!(logs[..2].iter().any(led) && led(&logs[2]), "{logs:?}");
}

#[test]
fn every_driven_replica_tells_where_it_stands() {
    let dir = on_disk();
    let (mut replicas, mut lines) = driven(dir.path(), |_| Vec::new());
    let follower = replicas[0].child().stdout.take().unwrap();
    let mut said_by_follower = BufReader::new(follower).lines();
    for (place, leads) in [(2, true), (0, false)] {
        use std::io::Write as _;
        writeln!(replicas[place].child().stdin.as_mut().unwrap(), "status").unwrap();
        let line = if leads { lines.next() } else { said_by_follower.next() }.unwrap().unwrap();
        let status: Value = serde_json::from_str(line.strip_prefix("STATUS ").unwrap()).unwrap();
        assert_eq!(status["leads"], leads, "{status}");
        assert!(status["commit"].is_u64() && status["applied"].is_u64(), "{status}");
    }
    dismissed(dir.path(), replicas, lines);
}

#[test]
fn a_driven_replica_does_what_it_is_ordered_or_nothing() {
    let dir = on_disk();
    for (order, why) in [
        ("bench 15 1 1 1", "a command has 16 bytes at least"),
        ("bench 16 0 1 1", "one is in flight"),
        ("bench 16 1 1", "not an order"),
        ("bench 16 1 1 1 1", "not an order"),
        ("bench 16 x 1 1", "invalid digit"),
        ("go", "not an order"),
    ] {
        let mut command = ringraft();
        let port = free_port().to_string();
        command.args(["node", "--drive", "--id", "1", "--ports", &port, "--dir"]).arg(dir.path().join(&port));
        command.args(SMALL).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = Guard::spawn(command).take();
        use std::io::Write as _;
        writeln!(child.stdin.as_mut().unwrap(), "{order}").unwrap();
        let output = child.wait_with_output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{order}: {errors}");
        assert!(errors.contains(why), "{order}: {errors}");
        assert!(!String::from_utf8_lossy(&output.stdout).contains("BEGIN"), "{order} is not begun");
    }
}
