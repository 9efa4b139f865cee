use super::*;
use crate::sim::trace::Trace;
use ringraft_block::{Block, Pool, SharedBlock};
use std::convert::Infallible;

/// One machine with one process on it.
struct Machine {
    context: Rc<Context>,
    state: Rc<RefCell<DiskState>>,
    disk: SimDisk,
    pool: Pool<SimBuf>,
    next_id: u64,
}

impl Machine {
    fn new(seed: u64) -> Self {
        let context = Context::new(Trace::new(false));
        let state = DiskState::new(&context, 0, Rng::new(seed), DiskConfig::default());
        let disk = SimDisk::new(&state);
        Self { context, state, disk, pool: Pool::new(1 << 20), next_id: 0 }
    }

    fn block(&self, blocks: usize, fill: u8) -> Block<SimBuf> {
        let bytes = blocks * BLOCK_BYTES;
        let mut block = self.pool.take(bytes, |bytes| Ok::<_, Infallible>(SimBuf::take(bytes))).unwrap();
        block.fill(fill);
        block
    }

    fn submit(&mut self, op: DiskOp<SimBuf>) -> DiskOpId {
        self.next_id += 1;
        self.disk.submit(DiskOpId(self.next_id), op);
        DiskOpId(self.next_id)
    }

    /// Lets everything in flight complete.
    fn settle(&mut self) -> Vec<DiskDone<SimBuf>> {
        let mut done = Vec::new();
        while let Some(due) = self.due() {
            self.context.advance_to(due.max(self.context.now()));
            self.disk.poll(&mut done);
        }
        done
    }

    fn due(&self) -> Option<Time> {
        self.state.borrow().next_due()
    }

    fn run(&mut self, op: DiskOp<SimBuf>) -> Result<DiskOutput<SimBuf>, DiskError> {
        let id = self.submit(op);
        let mut done = self.settle();
        assert_eq!(done.len(), 1);
        let done = done.pop().unwrap();
        assert_eq!(done.id, id);
        done.result
    }

    fn create(&mut self, name: &str, blocks: u64, access: Access) -> FileId {
        let bytes = blocks * BLOCK_BYTES as u64;
        match self.run(DiskOp::Create { name: name.to_owned(), bytes, access }).unwrap() {
            DiskOutput::Opened { file, .. } => file,
            _ => panic!("another output"),
        }
    }

    /// A file whose name and size survive a power cut.
    fn create_durably(&mut self, name: &str, blocks: u64, access: Access) -> FileId {
        let file = self.create(name, blocks, access);
        self.run(DiskOp::Flush { file }).unwrap();
        self.run(DiskOp::SyncDirectory).unwrap();
        file
    }

    fn write(&self, file: FileId, block: u64, blocks: usize, fill: u8) -> DiskOp<SimBuf> {
        let data: SharedBlock<SimBuf> = self.block(blocks, fill).share();
        DiskOp::Write { file, offset: block * BLOCK_BYTES as u64, block: data, bytes: blocks * BLOCK_BYTES }
    }

    fn read(&mut self, file: FileId, block: u64, blocks: usize) -> Vec<u8> {
        let (offset, bytes) = (block * BLOCK_BYTES as u64, blocks * BLOCK_BYTES);
        let target = self.block(blocks, 0xee);
        match self.run(DiskOp::Read { file, offset, block: target, bytes }).unwrap() {
            DiskOutput::Read { block, bytes } => block[..bytes].to_vec(),
            _ => panic!("another output"),
        }
    }

    fn crash(&mut self, how: Crash) {
        self.state.borrow_mut().crash(how);
        self.disk = SimDisk::new(&self.state);
    }

    fn open(&mut self, name: &str, access: Access) -> Result<FileId, DiskErrorKind> {
        match self.run(DiskOp::Open { name: name.to_owned(), access }) {
            Ok(DiskOutput::Opened { file, .. }) => Ok(file),
            Ok(_) => panic!("another output"),
            Err(error) => Err(error.kind),
        }
    }

    /// What a file holds after a crash, as a new process reads it.
    fn reread(&mut self, name: &str, blocks: usize) -> Vec<u8> {
        let file = self.open(name, Access::Read).unwrap();
        self.read(file, 0, blocks)
    }
}

/// What each 512 B sector is filled with; panics on a sector that is not uniform, which would be a torn sector.
fn sectors(bytes: &[u8]) -> Vec<u8> {
    let uniform = |sector: &[u8]| {
        assert!(sector.iter().all(|byte| *byte == sector[0]), "a sector is written whole or not at all");
        sector[0]
    };
    bytes.chunks(SECTOR_BYTES).map(uniform).collect()
}

#[test]
fn a_created_file_reads_as_zeros_and_gives_back_what_was_written() {
    let mut machine = Machine::new(1);
    let file = machine.create("a", 4, Access::DurableWrite);
    assert_eq!(sectors(&machine.read(file, 0, 4)), vec![0; 32]);
    let write = machine.write(file, 1, 2, 7);
    assert!(matches!(machine.run(write), Ok(DiskOutput::Written { bytes: 8192 })));
    let read = machine.read(file, 0, 4);
    assert_eq!(sectors(&read), [[0; 8], [7; 8], [7; 8], [0; 8]].concat());
    assert_eq!(machine.read(file, 3, 4).len(), BLOCK_BYTES, "a read ends at the end of the file");
}

#[test]
fn a_large_file_of_zeros_costs_no_memory() {
    let mut machine = Machine::new(1);
    let file = machine.create("a", 16 << 10, Access::Write);
    for megabyte in 0..64 {
        let write = machine.write(file, megabyte * 256, 256, 0);
        machine.run(write).unwrap();
    }
    machine.run(DiskOp::Flush { file }).unwrap();
    let state = machine.state.borrow();
    let inode = state.inodes[0].as_ref().unwrap();
    assert!(inode.pages.is_empty() && inode.unflushed.is_empty());
}

#[test]
fn a_durable_write_that_completed_survives_every_power_cut() {
    for seed in 0..100 {
        let mut machine = Machine::new(seed);
        let file = machine.create_durably("a", 4, Access::DurableWrite);
        let write = machine.write(file, 0, 4, 9);
        machine.run(write).unwrap();
        machine.crash(Crash::PowerCut);
        assert_eq!(sectors(&machine.reread("a", 4)), vec![9; 32]);
    }
}

#[test]
fn a_write_that_nobody_flushed_can_be_lost_torn_or_kept_by_a_power_cut() {
    let (mut lost, mut torn, mut kept) = (0, 0, 0);
    for seed in 0..200 {
        let mut machine = Machine::new(seed);
        let file = machine.create_durably("a", 4, Access::Write);
        let write = machine.write(file, 0, 4, 9);
        machine.run(write).unwrap();
        assert_eq!(sectors(&machine.read(file, 0, 4)), vec![9; 32], "it can be read before it is durable");
        machine.crash(Crash::PowerCut);
        let survivors = sectors(&machine.reread("a", 4)).iter().filter(|fill| **fill == 9).count();
        match survivors {
            0 => lost += 1,
            32 => kept += 1,
            _ => torn += 1,
        }
    }
    assert!(lost > 20 && torn > 20 && kept > 20, "{lost} {torn} {kept}");
}

#[test]
fn a_flushed_write_survives_and_one_in_flight_during_the_flush_need_not() {
    let mut lost = 0;
    for seed in 0..200 {
        let mut machine = Machine::new(seed);
        let file = machine.create_durably("a", 2, Access::Write);
        let first = machine.write(file, 0, 1, 1);
        machine.run(first).unwrap();
        let second = machine.write(file, 1, 1, 2);
        machine.submit(second);
        machine.submit(DiskOp::Flush { file });
        machine.settle();
        machine.crash(Crash::PowerCut);
        let after = sectors(&machine.reread("a", 2));
        assert_eq!(after[..8], [1; 8]);
        lost += u32::from(after[8..] != [2; 8]);
    }
    assert!(lost > 20, "{lost}");
}

#[test]
fn a_kill_keeps_completed_writes_but_does_not_make_them_durable() {
    let mut lost = 0;
    for seed in 0..100 {
        let mut machine = Machine::new(seed);
        let file = machine.create_durably("a", 1, Access::Write);
        let write = machine.write(file, 0, 1, 5);
        machine.run(write).unwrap();
        machine.crash(Crash::Kill);
        assert_eq!(sectors(&machine.reread("a", 1)), vec![5; 8]);
        machine.crash(Crash::PowerCut);
        lost += u32::from(sectors(&machine.reread("a", 1)) != vec![5; 8]);
    }
    assert!(lost > 20, "{lost}");
}

#[test]
fn of_a_write_in_flight_any_subset_of_sectors_survives_a_crash() {
    for how in [Crash::Kill, Crash::PowerCut] {
        let mut subsets = std::collections::BTreeSet::new();
        for seed in 0..400 {
            let mut machine = Machine::new(seed);
            let file = machine.create_durably("a", 1, Access::DurableWrite);
            let write = machine.write(file, 0, 1, 3);
            machine.submit(write);
            machine.crash(how);
            subsets.insert(sectors(&machine.reread("a", 1)));
        }
        assert!(subsets.contains(&vec![0; 8]) && subsets.contains(&vec![3; 8]));
        assert!(subsets.contains(&vec![3, 3, 3, 0, 0, 0, 0, 0]), "a prefix");
        assert!(subsets.len() > 40, "{}", subsets.len());
    }
}

#[test]
fn operations_in_flight_complete_out_of_order() {
    let mut machine = Machine::new(4);
    let file = machine.create("a", 64, Access::DurableWrite);
    for block in 0..64 {
        let write = machine.write(file, block, 1, 1);
        machine.submit(write);
    }
    let order: Vec<_> = machine.settle().iter().map(|done| done.id.0).collect();
    assert_eq!(order.len(), 64);
    assert!(!order.is_sorted());
    assert!(machine.context.coverage().of(Mark::WriteOvertook) > 0);
}

#[test]
fn a_created_file_is_there_after_a_power_cut_only_if_the_directory_was_synchronised() {
    let mut outcomes = [0; 2];
    for seed in 0..100 {
        let mut machine = Machine::new(seed);
        machine.create("a", 1, Access::Write);
        machine.crash(Crash::PowerCut);
        outcomes[usize::from(machine.open("a", Access::Read).is_ok())] += 1;

        let mut machine = Machine::new(seed);
        machine.create_durably("a", 1, Access::Write);
        machine.crash(Crash::PowerCut);
        assert_eq!(machine.state.borrow().listing(), [DirectoryEntry { name: "a".into(), bytes: 4096 }]);
    }
    assert!(outcomes.iter().all(|count| *count > 20), "{outcomes:?}");
}

#[test]
fn a_rename_replaces_wholly_or_not_at_all() {
    let mut outcomes = [0; 2];
    for seed in 0..100 {
        let mut machine = Machine::new(seed);
        for (name, fill) in [("old", 1), ("new", 2)] {
            let file = machine.create_durably(name, 1, Access::DurableWrite);
            let write = machine.write(file, 0, 1, fill);
            machine.run(write).unwrap();
        }
        machine.run(DiskOp::Rename { from: "new".into(), to: "old".into() }).unwrap();
        machine.crash(Crash::PowerCut);
        let content = sectors(&machine.reread("old", 1))[0];
        let renamed = content == 2;
        assert_eq!(machine.open("new", Access::Read).is_ok(), !renamed);
        outcomes[usize::from(renamed)] += 1;
    }
    assert!(outcomes.iter().all(|count| *count > 20), "{outcomes:?}");
}

#[test]
fn a_removed_file_may_return_with_its_content() {
    let mut returned = 0;
    for seed in 0..100 {
        let mut machine = Machine::new(seed);
        let file = machine.create_durably("a", 1, Access::DurableWrite);
        let write = machine.write(file, 0, 1, 6);
        machine.run(write).unwrap();
        machine.run(DiskOp::Close { file }).unwrap();
        machine.run(DiskOp::Remove { name: "a".into() }).unwrap();
        machine.crash(Crash::PowerCut);
        if machine.open("a", Access::Read).is_ok() {
            returned += 1;
            assert_eq!(sectors(&machine.reread("a", 1)), vec![6; 8]);
        }
    }
    assert!((20..80).contains(&returned), "{returned}");
}

#[test]
fn an_image_holds_what_is_durable_and_does_not_change_with_the_disk() {
    let mut machine = Machine::new(2);
    let file = machine.create_durably("a", 2, Access::DurableWrite);
    let write = machine.write(file, 0, 1, 1);
    machine.run(write).unwrap();
    let other = machine.create("b", 1, Access::Write);
    let write = machine.write(other, 0, 1, 1);
    machine.run(write).unwrap();
    let image = machine.state.borrow().durable_image(&machine.context);
    let hash = image.borrow().durable_hash();
    assert_eq!(image.borrow().listing(), [DirectoryEntry { name: "a".into(), bytes: 8192 }]);
    let write = machine.write(file, 0, 2, 8);
    machine.run(write).unwrap();
    assert_eq!(image.borrow().durable_hash(), hash);
    assert_ne!(machine.state.borrow().durable_hash(), hash);
}

#[test]
fn a_failed_operation_fails_once_and_a_failed_write_may_leave_some_sectors() {
    let mut machine = Machine::new(2);
    let file = machine.create_durably("a", 1, Access::DurableWrite);
    machine.state.borrow_mut().faults_mut().fail_after_ops = Some(1);
    let ops = [1, 2, 3].map(|fill| machine.write(file, 0, 1, fill));
    let results = ops.map(|op| machine.run(op).map(|_| ()).map_err(|error| error.kind));
    assert_eq!(results, [Ok(()), Err(DiskErrorKind::Io), Ok(())]);
}

#[test]
fn space_runs_out_and_names_are_checked() {
    let mut machine = Machine::new(2);
    machine.create("a", 1, Access::Write);
    let create = |name: &str, bytes| DiskOp::Create { name: name.into(), bytes, access: Access::Write };
    let kind = |result: Result<DiskOutput<SimBuf>, DiskError>| result.err().unwrap().kind;
    assert_eq!(kind(machine.run(create("a", 4096))), DiskErrorKind::AlreadyExists);
    assert_eq!(kind(machine.run(create("b", 1 << 50))), DiskErrorKind::NoSpace);
    assert_eq!(machine.open("c", Access::Read), Err(DiskErrorKind::NotFound));
}

#[test]
fn nothing_completes_while_the_disk_stands_still() {
    let mut machine = Machine::new(2);
    let file = machine.create("a", 1, Access::DurableWrite);
    let until = machine.context.now() + 1_000_000_000;
    machine.state.borrow_mut().faults_mut().stalled_until = until;
    machine.submit(DiskOp::Flush { file });
    assert_eq!(machine.due(), Some(until));
    assert_eq!(machine.settle().len(), 1);
    assert_eq!(machine.context.now(), until);
}

// ---- What a disk does wrong

impl Machine {
    fn schedule(&self, on: On, skip: u64, fault: Fault) {
        self.state.borrow_mut().faults_mut().scheduled.push(Scheduled { on, skip, fault });
    }

    /// A durable file of four blocks, each filled with its number from 1.
    fn numbered(seed: u64) -> (Self, FileId) {
        let mut machine = Self::new(seed);
        let file = machine.create_durably("a", 4, Access::DurableWrite);
        for block in 0..4 {
            let write = machine.write(file, block, 1, block as u8 + 1);
            machine.run(write).unwrap();
        }
        (machine, file)
    }

    fn kind(&mut self, op: DiskOp<SimBuf>) -> Result<usize, DiskErrorKind> {
        match self.run(op) {
            Ok(DiskOutput::Written { bytes } | DiskOutput::Read { bytes, .. }) => Ok(bytes),
            Ok(_) => Ok(0),
            Err(error) => Err(error.kind),
        }
    }

    fn read_op(&self, file: FileId, block: u64, blocks: usize) -> DiskOp<SimBuf> {
        let (offset, bytes) = (block * BLOCK_BYTES as u64, blocks * BLOCK_BYTES);
        DiskOp::Read { file, offset, block: self.block(blocks, 0xee), bytes }
    }
}

#[test]
fn a_scheduled_fault_strikes_the_nth_operation_of_its_kind_once() {
    let (mut machine, file) = Machine::numbered(3);
    machine.schedule(On::Write, 1, Fault::Io);
    machine.schedule(On::Flush, 0, Fault::NoSpace);
    machine.schedule(On::Read, 2, Fault::Io);
    let mut outcomes = Vec::new();
    for _ in 0..4 {
        let ops = [machine.write(file, 0, 1, 9), DiskOp::Flush { file }, machine.read_op(file, 3, 1)];
        outcomes.extend(ops.map(|op| machine.kind(op).err()));
    }
    let mut expected = vec![None; 12];
    expected[3] = Some(DiskErrorKind::Io);
    expected[1] = Some(DiskErrorKind::NoSpace);
    expected[8] = Some(DiskErrorKind::Io);
    assert_eq!(outcomes, expected);
    assert_eq!(machine.state.borrow().faults_struck(), 3);
}

#[test]
fn a_fault_leaves_an_operation_alone_that_it_cannot_happen_to() {
    let (mut machine, file) = Machine::numbered(3);
    for fault in [Fault::Lost, Fault::NoSpace] {
        machine.schedule(On::Any, 0, fault);
        let read = machine.read_op(file, 0, 1);
        assert_eq!(machine.kind(read), Ok(BLOCK_BYTES));
    }
    assert_eq!(machine.state.borrow().faults_struck(), 0);
}

#[test]
fn a_write_or_read_that_stops_short_says_so_and_does_no_more() {
    let mut counts = std::collections::BTreeSet::new();
    for seed in 0..50 {
        let (mut machine, file) = Machine::numbered(seed);
        machine.schedule(On::Write, 0, Fault::Short);
        let write = machine.write(file, 0, 4, 9);
        let written = machine.kind(write).unwrap();
        assert!(written < 4 * BLOCK_BYTES);
        let content = sectors(&machine.read(file, 0, 4));
        assert_eq!(content.iter().filter(|fill| **fill == 9).count(), written / SECTOR_BYTES);
        counts.insert(written / BLOCK_BYTES);
        machine.schedule(On::Read, 0, Fault::Short);
        let read = machine.read_op(file, 0, 4);
        assert!(machine.kind(read).unwrap() < 4 * BLOCK_BYTES);
    }
    assert_eq!(counts.into_iter().collect::<Vec<_>>(), [0, 1, 2, 3]);
}

#[test]
fn a_lost_write_is_reported_and_never_arrives() {
    let (mut machine, file) = Machine::numbered(1);
    machine.schedule(On::Write, 0, Fault::Lost);
    let write = machine.write(file, 0, 2, 9);
    assert_eq!(machine.kind(write), Ok(2 * BLOCK_BYTES));
    assert_eq!(sectors(&machine.read(file, 0, 2)), [[1; 8], [2; 8]].concat());
}

#[test]
fn a_misdirected_write_lands_elsewhere_and_a_misdirected_read_brings_what_is_elsewhere() {
    let mut files = std::collections::BTreeSet::new();
    for seed in 0..40 {
        let (mut machine, file) = Machine::numbered(seed);
        machine.create_durably("b", 4, Access::DurableWrite);
        machine.schedule(On::Write, 0, Fault::Misdirected);
        let write = machine.write(file, 1, 1, 9);
        assert_eq!(machine.kind(write), Ok(BLOCK_BYTES));
        let state = machine.state.borrow();
        assert_eq!(sectors(&state.content("a").unwrap())[8..16], [2; 8], "the right place keeps what it had");
        let hit: Vec<_> =
            ["a", "b"].into_iter().filter(|name| state.content(name).unwrap().contains(&9)).collect();
        assert_eq!(hit.len(), 1);
        files.insert(hit[0]);
        drop(state);
        machine.state.borrow_mut().damage("a", 0, 4 * BLOCK_BYTES, &Rot::Zero);
        machine.state.borrow_mut().damage("a", 4096, BLOCK_BYTES, &Rot::Content(vec![5]));
        machine.schedule(On::Read, 0, Fault::Misdirected);
        assert_ne!(sectors(&machine.read(file, 1, 1)), [5; 8]);
        assert_eq!(sectors(&machine.read(file, 1, 1)), [5; 8], "only once");
    }
    assert_eq!(files.len(), 2);
}

/// A batch that the device lost, with nothing that vouches for it, is the gap in the log's contract: here it is found damaged instead.
#[test]
fn a_batch_that_goes_elsewhere_spares_the_hard_state_and_its_place_is_damaged_unless_others_vouch_for_it() {
    let mut hit = 0;
    for seed in 0..40 {
        for (later, damaged) in [(0, true), (15, true), (16, false)] {
            let mut machine = Machine::new(seed);
            machine.create_durably("hard-a", 64, Access::DurableWrite);
            let file = machine.create_durably("segment-00000001.wal", 32, Access::DurableWrite);
            machine.schedule(On::Batch, 0, Fault::Misdirected);
            machine.run(machine.write(file, 0, 1, 8)).unwrap();
            assert_eq!(machine.read(file, 0, 1)[0], 8, "a header is no batch");
            machine.run(machine.write(file, 1, 1, 9)).unwrap();
            if machine.read(file, 1, 1)[0] == 9 {
                // The only file has offered its own place.
                continue;
            }
            for _ in 0..later {
                machine.run(machine.write(file, 31, 1, 7)).unwrap();
            }
            machine.crash(Crash::Kill);
            let state = machine.state.borrow();
            assert!(state.content("hard-a").unwrap().iter().all(|byte| *byte == 0));
            let content = state.content("segment-00000001.wal").unwrap();
            hit += usize::from(content.chunks(BLOCK_BYTES).any(|block| block == [9; BLOCK_BYTES]));
            let own = &content[BLOCK_BYTES..BLOCK_BYTES + SECTOR_BYTES];
            assert_eq!(own.iter().any(|byte| *byte != 0), damaged, "seed {seed}, {later} later");
        }
    }
    assert!(hit > 100, "{hit} of 120 went to where they can be seen");
}

#[test]
fn what_went_elsewhere_is_forgotten_with_its_file() {
    let mut machine = Machine::new(1);
    machine.create_durably("other", 64, Access::DurableWrite);
    let file = machine.create_durably("segment-00000001.wal", 32, Access::DurableWrite);
    machine.schedule(On::Batch, 0, Fault::Misdirected);
    machine.run(machine.write(file, 31, 1, 9)).unwrap();
    machine.run(DiskOp::Close { file }).unwrap();
    machine.run(DiskOp::Remove { name: "segment-00000001.wal".into() }).unwrap();
    machine.run(DiskOp::SyncDirectory).unwrap();
    // It may get the number of the file that was removed.
    machine.create_durably("snapshot", 1, Access::DurableWrite);
    machine.crash(Crash::Kill);
    assert!(machine.state.borrow().content("snapshot").unwrap().iter().all(|byte| *byte == 0));
}

#[test]
fn a_stalled_operation_is_overtaken_by_those_after_it() {
    let (mut machine, file) = Machine::numbered(1);
    machine.schedule(On::Write, 0, Fault::Stall(1_000_000_000));
    let start = machine.context.now();
    let ops = [machine.write(file, 0, 1, 8), machine.write(file, 1, 1, 8)];
    let ids = ops.map(|op| machine.submit(op));
    let order: Vec<_> = machine.settle().into_iter().map(|done| done.id).collect();
    assert_eq!(order, [ids[1], ids[0]]);
    assert!(machine.context.now() >= start + 1_000_000_000);
}

#[test]
fn a_stall_that_is_ended_leaves_an_operation_its_own_time() {
    let (mut machine, file) = Machine::numbered(1);
    machine.schedule(On::Write, 0, Fault::Stall(1_000_000_000));
    machine.schedule(On::Write, 1, Fault::Io);
    let start = machine.context.now();
    let ops = [machine.write(file, 0, 1, 8), machine.write(file, 1, 1, 8)];
    let ids = ops.map(|op| machine.submit(op));
    machine.state.borrow_mut().end_stalls();
    let done = machine.settle();
    assert!(machine.context.now() < start + 10_000_000);
    let outcome = |id| done.iter().find(|done| done.id == id).map(|done| done.result.is_ok());
    assert_eq!(ids.map(outcome), [Some(true), Some(false)], "other faults stay");

    // One that has waited longer than it would have taken by itself is due at once.
    machine.schedule(On::Write, 0, Fault::Stall(1_000_000_000));
    let op = machine.write(file, 0, 1, 8);
    let id = machine.submit(op);
    machine.context.advance_to(machine.context.now() + 500_000_000);
    let ended = machine.context.now();
    machine.state.borrow_mut().end_stalls();
    let done: Vec<_> = machine.settle().into_iter().map(|done| done.id).collect();
    assert_eq!((done, machine.context.now()), (vec![id], ended));
}

#[test]
fn rot_changes_what_it_names_and_survives_every_crash() {
    let (mut machine, _) = Machine::numbered(1);
    let before = machine.state.borrow().content("a").unwrap();
    let cases = [
        (0, 1, Rot::Flip(3)),
        (700, 100, Rot::Garbage(7)),
        (8192, 4096, Rot::Zero),
        (12_800, 512, Rot::Content(vec![1, 2])),
    ];
    for (offset, bytes, rot) in &cases {
        machine.state.borrow_mut().damage("a", *offset, *bytes, rot);
    }
    machine.crash(Crash::PowerCut);
    let after = machine.state.borrow().content("a").unwrap();
    for (position, (old, new)) in before.iter().zip(&after).enumerate() {
        let named = cases
            .iter()
            .any(|(offset, bytes, _)| (*offset as usize..*offset as usize + bytes).contains(&position));
        assert!(named || old == new, "byte {position}");
    }
    assert_eq!(after[0], 1 ^ 8);
    assert_ne!(after[700..800], before[700..800]);
    assert_eq!(after[8192..12_288], [0; 4096]);
    assert_eq!(after[12_800..12_804], [1, 2, 1, 2]);
}

#[test]
fn an_unreadable_sector_fails_reads_that_touch_it_until_it_is_written_again() {
    let (mut machine, file) = Machine::numbered(1);
    machine.state.borrow_mut().damage("a", 4096 + 512, 1, &Rot::Unreadable);
    let outcome = |machine: &mut Machine, block, blocks| {
        let read = machine.read_op(file, block, blocks);
        machine.kind(read)
    };
    assert_eq!(outcome(&mut machine, 0, 1), Ok(4096));
    assert_eq!(outcome(&mut machine, 1, 1), Err(DiskErrorKind::Io));
    assert_eq!(outcome(&mut machine, 0, 4), Err(DiskErrorKind::Io));
    let write = machine.write(file, 1, 1, 9);
    machine.run(write).unwrap();
    assert_eq!(sectors(&machine.read(file, 0, 4))[8..16], [9; 8]);
}

#[test]
fn a_crash_image_holds_exactly_the_survivors_that_were_picked() {
    let (mut machine, file) = Machine::numbered(1);
    let write = machine.write(file, 0, 2, 9);
    machine.submit(write);
    let state = machine.state.borrow();
    let pending = state.pending();
    assert_eq!(pending.len(), 16);
    for mask in [0_u32, 1, 0x8001, 0xa5a5, 0xffff] {
        let image = state.crash_image(&machine.context, &pending, |position| mask >> position & 1 == 1);
        let content = sectors(&image.borrow().content("a").unwrap());
        for (position, fill) in content.iter().take(16).enumerate() {
            let survived = mask >> position & 1 == 1;
            assert_eq!(*fill, if survived { 9 } else { position as u8 / 8 + 1 }, "{mask:x} {position}");
        }
        assert_eq!(content[16..], [[3; 8], [4; 8]].concat());
    }
}

#[test]
fn names_and_sizes_that_are_not_durable_are_pending_too() {
    let mut machine = Machine::new(1);
    machine.create_durably("a", 1, Access::Write);
    machine.run(DiskOp::Rename { from: "a".into(), to: "c".into() }).unwrap();
    machine.create("b", 1, Access::Write);
    let state = machine.state.borrow();
    let pending = state.pending();
    assert_eq!(format!("{pending:?}"), "[size of file 1, rename a to c, create b]");
    let names = |mask: u32| {
        let image = state.crash_image(&machine.context, &pending, |position| mask >> position & 1 == 1);
        let listing = image.borrow().listing();
        listing.into_iter().map(|entry| format!("{}:{}", entry.name, entry.bytes)).collect::<Vec<_>>()
    };
    assert_eq!(names(0b000), ["a:4096"]);
    assert_eq!(names(0b010), ["c:4096"]);
    assert_eq!(names(0b100), ["a:4096", "b:0"]);
    assert_eq!(names(0b111), ["b:4096", "c:4096"]);
}

#[test]
fn a_fork_behaves_as_its_original_and_neither_changes_the_other() {
    let (mut machine, _) = Machine::numbered(5);
    machine.crash(Crash::PowerCut);
    let context = Context::new(Trace::new(false));
    context.advance_to(machine.context.now());
    let fork = machine.state.borrow().fork(&context);
    let hash = machine.state.borrow().durable_hash();
    let disk = SimDisk::new(&fork);
    let mut other = Machine { context, state: fork, disk, pool: Pool::new(1 << 20), next_id: 0 };
    let run = |machine: &mut Machine| {
        let file = machine.open("a", Access::Write).unwrap();
        for block in 0..4 {
            let write = machine.write(file, block, 1, 7);
            machine.submit(write);
        }
        machine.settle();
        machine.crash(Crash::PowerCut);
        (machine.context.now(), machine.state.borrow().durable_hash())
    };
    let forked = run(&mut other);
    assert_eq!(machine.state.borrow().durable_hash(), hash);
    assert_eq!(run(&mut machine), forked);
}
