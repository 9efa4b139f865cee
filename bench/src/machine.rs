//! Facts about the machine: what a figure was measured on, and what the kernel counted meanwhile.

use crate::exit::{self, Failure};
use rustix::process::Pid;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// What the figures were measured on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Environment {
    /// Of the program that measured.
    pub version: String,
    /// Debug assertions make everything slower: such figures are for tests.
    pub optimised: bool,
    /// When.
    pub unix_time_s: u64,
    /// The kernel's release.
    pub kernel: String,
    /// The processor's model.
    pub cpu: String,
    /// Processors that this program may use.
    pub cpus: usize,
    /// Memory of the machine.
    pub memory_mib: u64,
    /// Of the data's directory.
    pub file_system: String,
    /// The device below it.
    pub device: Option<String>,
    /// What kind of device that is.
    pub device_class: Option<String>,
    /// Processes that wanted to run in the last minute, on average.
    pub load_1min_before: Option<f64>,
}

/// Looks at the machine and at the disk of `dir`.
pub(crate) fn environment(dir: &Path) -> anyhow::Result<Environment> {
    let cpu_info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpu_info.lines().find_map(|line| line.strip_prefix("model name"));
    let load = fs::read_to_string("/proc/loadavg").ok();
    let sysinfo = rustix::system::sysinfo();
    let device = BlockDevice::of(dir);
    Ok(Environment {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        optimised: !cfg!(debug_assertions),
        unix_time_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        cpu: cpu.map_or_else(|| "unknown".to_owned(), |name| name.trim_matches([' ', '\t', ':']).to_owned()),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        memory_mib: (sysinfo.totalram as u64 * u64::from(sysinfo.mem_unit)) >> 20,
        file_system: file_system(dir)?,
        device_class: device.as_ref().map(BlockDevice::class),
        device: device.map(|device| device.name),
        load_1min_before: load.and_then(|load| load.split(' ').next()?.parse().ok()),
    })
}

/// The name of `dir`'s file system; fails where nothing can be durable.
pub(crate) fn file_system(dir: &Path) -> anyhow::Result<String> {
    let stat = rustix::fs::statfs(dir).map_err(|error| Failure {
        code: exit::DIRECTORY,
        message: format!("cannot look at {}: {error}", dir.display()),
    })?;
    Ok(match stat.f_type as u64 & 0xffff_ffff {
        0xef53 => "ext4".to_owned(),
        0x5846_5342 => "xfs".to_owned(),
        0x9123_683e => "btrfs".to_owned(),
        0xf2f5_2010 => "f2fs".to_owned(),
        0x2fc1_2fc1 => "zfs".to_owned(),
        0x794c_7630 => "overlay".to_owned(),
        0x6969 => "nfs".to_owned(),
        0x0102_1994 | 0x8584_58f6 => {
            return Err(Failure {
                code: exit::NOT_ON_DISK,
                message: format!(
                    "{} is on a file system in memory (tmpfs or ramfs), where no write is ever durable. Cure: --dir \
                     with a directory on a disk, such as one under your home directory",
                    dir.display()
                ),
            }
            .into());
        }
        other => format!("type {other:#x}"),
    })
}

/// The device below a directory, and its counters.
#[derive(Clone, Debug)]
pub(crate) struct BlockDevice {
    pub(crate) name: String,
    counters: PathBuf,
}

impl BlockDevice {
    /// The device of `dir`; none where the file system has no single one (btrfs, overlay, network).
    pub(crate) fn of(dir: &Path) -> Option<Self> {
        let device = fs::metadata(dir).ok()?.dev();
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        let place = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()?;
        let name = place.file_name()?.to_string_lossy().into_owned();
        let device = Self { name, counters: place.join("stat") };
        device.written_bytes().map(|_| device)
    }

    /// Its kind, and what the kernel says of its cache.
    fn class(&self) -> String {
        let kind = match self.name.trim_end_matches(|c: char| c.is_ascii_digit()) {
            name if name.starts_with("nvme") => "NVMe",
            name if name.starts_with("vd") => "virtio",
            name if name.starts_with("sd") => "SCSI or SATA",
            name if name.starts_with("dm-") => "device mapper",
            name if name.starts_with("md") => "RAID",
            name if name.starts_with("loop") => "loop",
            name => name,
        };
        // A partition has its disk's queue.
        let mut queues = self.counters.ancestors().skip(1).take(2).map(|device| device.join("queue"));
        let queue = queues.find(|queue| queue.is_dir());
        let says = |name: &str| Some(fs::read_to_string(queue.as_ref()?.join(name)).ok()?.trim().to_owned());
        let turns = says("rotational").map(|says| if says == "1" { "rotating" } else { "not rotating" });
        let fua = says("fua").map(|says| if says == "1" { "FUA" } else { "no FUA" });
        let cache = says("write_cache").map(|says| format!("{says} cache"));
        let said = turns.map(str::to_owned).into_iter().chain(cache).chain(fua.map(str::to_owned));
        std::iter::once(kind.to_owned()).chain(said).collect::<Vec<_>>().join(", ")
    }

    /// Bytes written to it since the machine started, by anybody.
    pub(crate) fn written_bytes(&self) -> Option<u64> {
        // Documentation/block/stat.rst: the seventh field counts written sectors of 512 bytes.
        let counters = fs::read_to_string(&self.counters).ok()?;
        Some(counters.split_whitespace().nth(6)?.parse::<u64>().ok()? * 512)
    }
}

/// Processor time of a process, all its threads and kernel workers, in nanoseconds.
pub(crate) fn cpu_ns(pid: Pid) -> Option<u64> {
    let mut clock = 0;
    // SAFETY: `clock` is a valid place for the result.
    if unsafe { libc::clock_getcpuclockid(pid.as_raw_nonzero().get(), &mut clock) } != 0 {
        return None;
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place for the result; an id that has become invalid is an error.
    if unsafe { libc::clock_gettime(clock, &mut time) } != 0 {
        return None;
    }
    Some(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}

/// Processor time of the whole machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MachineTime {
    /// Spent by any process or by the kernel, in nanoseconds.
    pub(crate) busy_ns: u64,
    /// Taken by the hypervisor for others.
    pub(crate) steal_ns: u64,
}

/// Reads the machine's processor time, counted in ticks of 10 ms as a rule.
pub(crate) fn machine_time() -> Option<MachineTime> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    // proc(5): user, nice, system, idle, iowait, irq, softirq, steal.
    let ticks = stat.lines().next()?.split_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok());
    let ticks: Vec<u64> = ticks.collect();
    let tick_ns = 1_000_000_000 / rustix::param::clock_ticks_per_second().max(1);
    let sum = |fields: &[usize]| fields.iter().filter_map(|field| ticks.get(*field)).sum::<u64>() * tick_ns;
    Some(MachineTime { busy_ns: sum(&[0, 1, 2, 5, 6]), steal_ns: sum(&[7]) })
}

/// Bytes that a process caused to be written to storage, by `/proc/PID/io`: right for direct I/O, misleading for
/// buffered.
pub(crate) fn process_written_bytes(pid: Pid) -> Option<u64> {
    let io = fs::read_to_string(format!("/proc/{}/io", pid.as_raw_nonzero())).ok()?;
    io.lines().find_map(|line| line.strip_prefix("write_bytes: ")?.trim().parse().ok())
}

/// Segments of a log that a process has open for writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LogFiles {
    /// With both `O_DIRECT` and `O_DSYNC`.
    pub(crate) durable: usize,
    /// With one of them, or none.
    pub(crate) others: usize,
}

/// The segments in service under `dir` that a process has open for writing, as `/proc` shows it; none where it does
/// not show it to this process. A process that has ended has nothing open.
pub(crate) fn log_files(pid: Pid, dir: &Path) -> Option<LogFiles> {
    log_files_in(&Path::new("/proc").join(pid.as_raw_nonzero().to_string()), dir)
}

fn log_files_in(process: &Path, dir: &Path) -> Option<LogFiles> {
    let mut found = LogFiles { durable: 0, others: 0 };
    let files = match fs::read_dir(process.join("fd")) {
        Ok(files) => files,
        // Without a /proc nothing is there either.
        Err(error) if error.kind() == ErrorKind::NotFound && Path::new("/proc/self/fd").exists() => {
            return Some(found);
        }
        Err(_) => return None,
    };
    for file in files.flatten() {
        // A file may be closed at any moment.
        let Ok(path) = fs::read_link(file.path()) else { continue };
        if !path.starts_with(dir) || path.extension().is_none_or(|extension| extension != "wal") {
            continue;
        }
        let info = match fs::read_to_string(process.join("fdinfo").join(file.file_name())) {
            Ok(info) => info,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(_) => return None,
        };
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
        let flags = i32::from_str_radix(flags.trim(), 8).ok()?;
        if flags & libc::O_ACCMODE == libc::O_RDONLY {
            continue;
        }
        match flags & libc::O_DIRECT != 0 && flags & libc::O_DSYNC != 0 {
            true => found.durable += 1,
            false => found.others += 1,
        }
    }
    Some(found)
}

/// An absolute path without symbolic links.
pub(crate) fn canonical(dir: &Path) -> anyhow::Result<PathBuf> {
    Ok(fs::canonicalize(dir).map_err(|error| Failure {
        code: exit::DIRECTORY,
        message: format!("cannot use {}: {error}. Cure: --dir with a directory that exists", dir.display()),
    })?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_time_of_this_process_grows() {
        let own = rustix::process::getpid();
        let before = cpu_ns(own).unwrap();
        let mut number = 1_u64;
        while cpu_ns(own).unwrap() < before + 1_000_000 {
            number = std::hint::black_box(number.wrapping_mul(3));
        }
    }

    #[test]
    fn a_segment_counts_as_durable_only_with_both_flags() {
        use std::os::unix::fs::OpenOptionsExt as _;
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let open = |name: &str, flags| {
            let mut options = fs::OpenOptions::new();
            options.write(true).create_new(true).custom_flags(flags).open(dir.path().join(name)).unwrap()
        };
        let own = rustix::process::getpid();
        let path = canonical(dir.path()).unwrap();
        let seen = || {
            let files = log_files(own, &path).unwrap();
            (files.durable, files.others)
        };
        // Neither a segment that is being made, nor one that is only read, says anything.
        let _other = open("segment-00000001.new", libc::O_DIRECT);
        assert_eq!(seen(), (0, 0));
        let _durable = open("segment-00000002.wal", libc::O_DIRECT | libc::O_DSYNC);
        let _read = fs::File::open(dir.path().join("segment-00000002.wal")).unwrap();
        assert_eq!(seen(), (1, 0));
        let _direct = open("segment-00000003.wal", libc::O_DIRECT);
        assert_eq!(seen(), (1, 1));
        let _sync = open("segment-00000004.wal", libc::O_DSYNC);
        assert_eq!(seen(), (1, 2));
    }

    #[test]
    fn what_proc_does_not_show_is_not_taken_for_nothing() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(
            log_files_in(&dir.path().join("absent"), dir.path()),
            Some(LogFiles { durable: 0, others: 0 }),
            "a process that has ended"
        );
        // Not a directory: as little to be listed as one without the permission, which root would have.
        fs::write(dir.path().join("fd"), "").unwrap();
        assert_eq!(log_files_in(dir.path(), dir.path()), None);
    }

    #[test]
    fn the_environment_of_this_package_is_readable() {
        let environment = environment(Path::new(env!("CARGO_MANIFEST_DIR"))).unwrap();
        assert!(machine_time().unwrap().busy_ns > 0);
        assert!(environment.cpus > 0 && environment.memory_mib > 0 && !environment.kernel.is_empty());
        assert_eq!(environment.device.is_some(), environment.device_class.is_some(), "{environment:?}");
    }
}
