use super::*;

const SECTORS: u64 = 256;

fn disk() -> FaultDisk {
    let mut formatted = Image::zeroed(SECTORS * SECTOR_BYTES as u64);
    formatted.write(0, &vec![1; (SECTORS * SECTOR_BYTES as u64) as usize]);
    FaultDisk::new(formatted)
}

fn at(sector: u64) -> u64 {
    sector * SECTOR_BYTES as u64
}

fn fill(disk: &mut FaultDisk, sector: u64, count: usize, value: u8) -> Result<(), DiskError> {
    disk.write(at(sector), &vec![value; count * SECTOR_BYTES])
}

/// The value of each sector; a sector is never mixed.
fn values(disk: &mut FaultDisk, sector: u64, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count * SECTOR_BYTES];
    disk.read(at(sector), &mut bytes).expect("the disk is on");
    let sectors = bytes.chunks(SECTOR_BYTES);
    sectors
        .map(|sector| {
            assert!(sector.iter().all(|byte| *byte == sector[0]), "a sector is written in part");
            sector[0]
        })
        .collect()
}

fn trigger(on: On, after: u64, effect: Effect) -> Trigger {
    Trigger { on, after, cached_min: 0, effect }
}

#[test]
fn what_was_flushed_survives_and_what_was_not_need_not() {
    for survival in [Survival::None, Survival::Random] {
        for seed in 0..50 {
            let mut disk = disk();
            fill(&mut disk, 0, 8, 2).unwrap();
            disk.flush().unwrap();
            fill(&mut disk, 8, 8, 3).unwrap();
            assert_eq!(values(&mut disk, 8, 1), [3], "the cache is read");
            let survived = disk.power_on(seed, survival);
            assert_eq!(values(&mut disk, 0, 8), [2; 8]);
            let rest = values(&mut disk, 8, 8);
            let new = rest.iter().filter(|value| **value == 3).count();
            assert!(rest.iter().all(|value| [1, 3].contains(value)));
            match new {
                0 => assert_eq!(survived, Survived { lost: 1, ..Survived::default() }),
                8 => assert_eq!(survived, Survived { kept: 1, ..Survived::default() }),
                _ => assert_eq!(survived, Survived { torn: 1, ..Survived::default() }),
            }
            assert!(survival == Survival::Random || new == 0);
        }
    }
}

#[test]
fn over_many_seeds_writes_are_kept_lost_torn_and_overtaken() {
    let (mut sum, mut overtaken) = (Survived::default(), 0);
    for seed in 0..200 {
        let mut disk = disk();
        for write in 0..10 {
            fill(&mut disk, write * 8, 8, 2).unwrap();
        }
        fill(&mut disk, 0, 8, 3).unwrap();
        let survived = disk.power_on(seed, Survival::Random);
        sum.kept += survived.kept;
        sum.torn += survived.torn;
        sum.lost += survived.lost;
        // The later write to the same place is there, and the one before it nowhere.
        let first = values(&mut disk, 0, 8);
        overtaken += u32::from(first.contains(&3) && values(&mut disk, 8, 8) == [1; 8]);
    }
    assert!(sum.kept > 200 && sum.torn > 200 && sum.lost > 200, "{sum:?}");
    assert!(overtaken > 10, "{overtaken}");
}

#[test]
fn the_same_seed_leaves_the_same() {
    let run = |seed| {
        let mut disk = disk();
        for write in 0..10 {
            fill(&mut disk, write * 8, 8, write as u8 + 2).unwrap();
        }
        disk.power_on(seed, Survival::Random);
        values(&mut disk, 0, 80)
    };
    assert_eq!(run(5), run(5));
    assert_ne!(run(5), run(6));
}

#[test]
fn once_the_power_is_cut_nothing_is_accepted() {
    let mut disk = disk();
    disk.arm(trigger(On::Any, 2, Effect::Cut));
    fill(&mut disk, 0, 1, 2).unwrap();
    disk.flush().unwrap();
    assert_eq!(fill(&mut disk, 1, 1, 2), Err(DiskError::Io));
    assert_eq!(disk.flush(), Err(DiskError::Io));
    assert_eq!(disk.read(0, &mut [0; 512]), Err(DiskError::Io));
    disk.strike(Effect::Lie);
    assert_eq!(disk.flush(), Err(DiskError::Io), "no other fault brings the power back");
    let before = disk.cuts();
    disk.power_on(1, Survival::None);
    assert_eq!(disk.cuts(), before, "it was off already");
    assert_eq!(values(&mut disk, 0, 2), [2, 1]);
}

#[test]
fn a_cut_waits_for_as_many_cached_writes_as_it_is_told() {
    let mut disk = disk();
    disk.arm(Trigger { cached_min: 2, ..trigger(On::Any, 1, Effect::Cut) });
    for write in 0..3 {
        fill(&mut disk, write, 1, 2).unwrap();
        disk.flush().unwrap();
    }
    fill(&mut disk, 3, 1, 2).unwrap();
    fill(&mut disk, 4, 1, 2).unwrap();
    assert_eq!(disk.flush(), Err(DiskError::Io));
    let Survived { kept, torn, lost } = disk.power_on(1, Survival::None);
    assert_eq!((kept, torn, lost), (0, 0, 2));
}

#[test]
fn a_write_that_the_cut_meets_fails_and_survives_in_part() {
    let mut seen = [false; 3];
    for seed in 0..50 {
        let mut disk = disk();
        disk.arm(trigger(On::Write, 0, Effect::Cut));
        assert_eq!(fill(&mut disk, 0, 8, 2), Err(DiskError::Io));
        assert_eq!(fill(&mut disk, 8, 8, 2), Err(DiskError::Io));
        disk.power_on(seed, Survival::Random);
        assert_eq!(values(&mut disk, 8, 8), [1; 8], "that one came too late");
        let new = values(&mut disk, 0, 8).iter().filter(|value| **value == 2).count();
        seen[usize::from(new > 0) + usize::from(new == 8)] = true;
    }
    assert_eq!(seen, [true; 3], "none, some and all of it");
}

#[test]
fn a_lying_disk_acknowledges_flushes_and_keeps_only_what_was_durable_before() {
    let mut disk = disk();
    fill(&mut disk, 0, 1, 2).unwrap();
    disk.flush().unwrap();
    disk.strike(Effect::Lie);
    fill(&mut disk, 1, 1, 3).unwrap();
    disk.flush().unwrap();
    assert_eq!((disk.stats().flushes, disk.stats().lies), (2, 1));
    assert_eq!(values(&mut disk, 0, 2), [2, 3]);
    assert_eq!(disk.power_on(1, Survival::None).lost, 1);
    assert_eq!(values(&mut disk, 0, 2), [2, 1]);
    fill(&mut disk, 1, 1, 4).unwrap();
    disk.flush().unwrap();
    disk.power_on(1, Survival::None);
    assert_eq!(values(&mut disk, 1, 1), [4], "the lie ends with the power");
}

#[test]
fn a_failed_write_does_not_happen_and_a_failed_flush_makes_nothing_durable() {
    let mut disk = disk();
    disk.arm(trigger(On::Write, 1, Effect::Error));
    disk.arm(trigger(On::Flush, 0, Effect::Error));
    fill(&mut disk, 0, 1, 2).unwrap();
    assert_eq!(disk.flush(), Err(DiskError::Io));
    assert_eq!(fill(&mut disk, 1, 1, 2), Err(DiskError::Io));
    assert_eq!(values(&mut disk, 0, 2), [2, 1]);
    assert_eq!((disk.stats().triggered, disk.stats().refused), (2, 2));
    disk.power_on(1, Survival::None);
    assert_eq!(values(&mut disk, 0, 2), [1, 1]);
}

#[test]
fn a_full_disk_takes_no_writes_but_flushes_what_it_has() {
    let mut disk = disk();
    disk.arm(trigger(On::Write, 1, Effect::Full));
    fill(&mut disk, 0, 1, 2).unwrap();
    assert_eq!(fill(&mut disk, 1, 1, 2), Err(DiskError::Full));
    assert_eq!(fill(&mut disk, 1, 1, 2), Err(DiskError::Full), "until the power has been off");
    disk.flush().unwrap();
    disk.power_on(1, Survival::None);
    assert_eq!(values(&mut disk, 0, 2), [2, 1]);
    fill(&mut disk, 1, 1, 2).unwrap();
    assert_eq!(disk.stats().refused, 2);
}

#[test]
fn a_hung_disk_answers_nothing_until_its_power_is_cut() {
    let mut disk = disk();
    disk.strike(Effect::Hang);
    assert_eq!(fill(&mut disk, 0, 1, 2), Err(DiskError::Hung));
    assert_eq!(disk.flush(), Err(DiskError::Hung));
    assert_eq!(disk.read(0, &mut [0; 512]), Err(DiskError::Hung));
    disk.strike(Effect::Cut);
    assert_eq!(disk.flush(), Err(DiskError::Io));
    assert_eq!(disk.stats().refused, 3, "without power nothing refuses");
}

#[test]
fn nothing_goes_beyond_the_end() {
    let mut disk = disk();
    assert_eq!(fill(&mut disk, SECTORS - 1, 2, 2), Err(DiskError::Io));
    assert_eq!(disk.read(at(SECTORS), &mut [0; 1]), Err(DiskError::Io));
    assert_eq!(disk.stats().writes, 0);
}

#[test]
fn a_reset_disk_holds_what_it_held_at_first() {
    let mut disk = disk();
    fill(&mut disk, 0, 4, 2).unwrap();
    disk.flush().unwrap();
    disk.strike(Effect::Cut);
    disk.reset();
    assert_eq!(values(&mut disk, 0, 4), [1; 4]);
    assert_eq!((disk.stats().writes, disk.stats().cuts), (0, 1));
}
