use super::*;

const SECTOR: usize = SECTOR_BYTES;

fn trigger(on: On, after: u64, effect: Effect) -> Trigger {
    Trigger { on, after, cached_min: 0, effect }
}

/// A durable file of so many sectors, all of value 1, in a durable directory.
fn volume(sectors: usize) -> (FaultVolume, u64, u64) {
    let mut volume = FaultVolume::new();
    let directory = volume.make(ROOT, "node-1", true).unwrap();
    let file = volume.make(directory, "file", false).unwrap();
    volume.write(file, 0, &vec![1; sectors * SECTOR], false).unwrap();
    volume.flush(file).unwrap();
    volume.flush_names(directory).unwrap();
    volume.flush_names(ROOT).unwrap();
    (volume, directory, file)
}

/// The value of each sector; a sector is never mixed.
fn values(volume: &mut FaultVolume, file: u64) -> Vec<u8> {
    let bytes = volume.read(file, 0, 1 << 20).unwrap();
    let sectors = bytes.chunks(SECTOR);
    sectors
        .map(|sector| {
            assert!(sector.iter().all(|byte| *byte == sector[0]), "a sector is written in part");
            sector[0]
        })
        .collect()
}

fn names(volume: &FaultVolume, directory: u64) -> Vec<String> {
    volume.list(directory).unwrap().into_iter().map(|(name, ..)| name).collect()
}

#[test]
fn a_durable_write_survives_and_vouches_for_no_other() {
    let (mut lost, mut kept) = (0, 0);
    for seed in 0..50 {
        let (mut volume, _, file) = volume(4);
        volume.write(file, 0, &[2; SECTOR], false).unwrap();
        volume.write(file, SECTOR as u64, &[3; SECTOR], true).unwrap();
        volume.power_on(seed, Survival::Random);
        let values = values(&mut volume, file);
        assert_eq!(values[1..], [3, 1, 1]);
        lost += u32::from(values[0] == 1);
        kept += u32::from(values[0] == 2);
    }
    assert!(lost > 5 && kept > 5, "{lost} {kept}");
}

#[test]
fn a_durable_write_is_not_undone_by_an_older_one_to_its_place() {
    for seed in 0..50 {
        let (mut volume, _, file) = volume(2);
        volume.write(file, 0, &[2; 2 * SECTOR], false).unwrap();
        volume.write(file, 0, &[3; SECTOR], true).unwrap();
        volume.power_on(seed, Survival::Random);
        assert_eq!(values(&mut volume, file)[0], 3);
    }
}

#[test]
fn a_flush_makes_writes_and_size_durable() {
    let (mut volume, _, file) = volume(1);
    volume.grow(file, 4 * SECTOR as u64).unwrap();
    volume.write(file, SECTOR as u64, &[2; SECTOR], false).unwrap();
    volume.flush(file).unwrap();
    volume.power_on(1, Survival::None);
    assert_eq!(values(&mut volume, file), [1, 2, 0, 0]);
}

#[test]
fn a_file_that_grew_may_be_shorter_after_the_cut_and_what_is_cut_off_reads_as_zeros_later() {
    let mut sizes = BTreeSet::new();
    for seed in 0..50 {
        let (mut volume, _, file) = volume(1);
        volume.write(file, SECTOR as u64, &[2; 7 * SECTOR], false).unwrap();
        volume.power_on(seed, Survival::Random);
        let Kind::File(bytes) = volume.kind(file).unwrap() else { panic!("a file") };
        sizes.insert(bytes);
        volume.grow(file, 16 * SECTOR as u64).unwrap();
        let back = volume.read(file, 0, 16 * SECTOR).unwrap();
        assert!(back[bytes as usize..].iter().all(|byte| *byte == 0));
        volume.power_on(seed, Survival::None);
        assert_eq!(volume.kind(file), Ok(Kind::File(bytes)));
    }
    assert!(sizes.contains(&(SECTOR as u64)) && sizes.contains(&(8 * SECTOR as u64)) && sizes.len() > 4);
}

#[test]
fn names_survive_when_their_directory_was_flushed_and_else_in_part() {
    let (mut made, mut renamed) = (0, 0);
    for seed in 0..50 {
        let (mut volume, directory, file) = volume(1);
        volume.make(directory, "another", false).unwrap();
        volume.rename(directory, "file", "renamed").unwrap();
        volume.power_on(seed, Survival::Random);
        let names = names(&volume, directory);
        made += u32::from(names.contains(&"another".to_owned()));
        renamed += u32::from(names.contains(&"renamed".to_owned()));
        assert!(names.contains(&"renamed".to_owned()) != names.contains(&"file".to_owned()));
        assert_eq!(values(&mut volume, file), [1]);

        let third = volume.make(directory, "third", false).unwrap();
        volume.flush_names(directory).unwrap();
        volume.remove(directory, "third").unwrap();
        assert_eq!(volume.look_up(directory, "third"), Err(VolumeError::NotFound));
        volume.power_on(seed, Survival::None);
        assert_eq!(volume.look_up(directory, "third"), Ok(third));
    }
    assert!((10..40).contains(&made) && (10..40).contains(&renamed), "{made} {renamed}");
}

#[test]
fn once_the_power_is_cut_nothing_is_answered_and_what_is_under_way_is_torn() {
    let mut seen = [false; 3];
    for seed in 0..50 {
        let (mut volume, _, file) = volume(16);
        volume.arm(None, trigger(On::Write, 1, Effect::Cut));
        volume.write(file, 0, &[2; SECTOR], true).unwrap();
        assert_eq!(volume.write(file, SECTOR as u64, &[3; 7 * SECTOR], true), Err(VolumeError::Hung));
        assert_eq!(volume.write(file, 8 * SECTOR as u64, &[4; 8 * SECTOR], true), Err(VolumeError::Hung));
        assert_eq!(volume.flush(file), Err(VolumeError::Hung));
        assert_eq!(volume.read(file, 0, 1), Err(VolumeError::Hung));
        assert!(!volume.is_powered());
        volume.power_on(seed, Survival::Random);
        let values = values(&mut volume, file);
        assert_eq!(values[0], 2);
        let new = values[8..].iter().filter(|value| **value == 4).count();
        seen[usize::from(new > 0) + usize::from(new == 8)] = true;
    }
    assert_eq!(seen, [true; 3], "none, some and all of the second one too");
}

#[test]
fn a_fault_of_one_directory_is_none_of_the_others() {
    let (mut volume, _, first) = volume(1);
    let other = volume.make(ROOT, "node-2", true).unwrap();
    let second = volume.make(other, "file", false).unwrap();
    volume.arm(Some("node-1".to_owned()), trigger(On::Any, 1, Effect::Error));
    volume.write(first, 0, &[2; SECTOR], true).unwrap();
    for _ in 0..5 {
        volume.write(second, 0, &[2; SECTOR], true).unwrap();
    }
    assert_eq!(volume.write(first, 0, &[3; SECTOR], true), Err(VolumeError::Io));
    volume.write(first, 0, &[4; SECTOR], true).unwrap();
    assert_eq!(volume.stats().after_error, 1);
    volume.strike(Some("node-1"), Effect::Hang);
    assert_eq!(volume.read(first, 0, 1), Err(VolumeError::Hung));
    assert_eq!(volume.read(second, 0, 1), Ok(vec![2]));
    assert_eq!(volume.stats().refused, 2);
}

#[test]
fn a_failed_read_write_and_flush_fail_once() {
    let (mut torn, mut forgotten) = (0, 0);
    for seed in 0..50 {
        let (mut volume, _, file) = volume(8);
        volume.power_on(seed, Survival::None);
        for on in [On::Read, On::Write, On::Flush] {
            volume.arm(None, trigger(on, 0, Effect::Error));
        }
        assert_eq!(volume.read(file, 0, 1), Err(VolumeError::Io));
        assert_eq!(volume.write(file, 0, &[2; 8 * SECTOR], true), Err(VolumeError::Io));
        let values_of = values(&mut volume, file);
        torn += u32::from(values_of.contains(&1) && values_of.contains(&2));
        volume.write(file, 0, &[3; 8 * SECTOR], false).unwrap();
        assert_eq!(volume.flush(file), Err(VolumeError::Io));
        forgotten += u32::from(values(&mut volume, file) != [3; 8]);
        volume.flush(file).unwrap();
    }
    assert!(torn > 5 && (10..40).contains(&forgotten), "{torn} {forgotten}");
}

#[test]
fn a_full_volume_takes_what_it_has_space_for_until_there_is_more() {
    let (mut volume, directory, file) = volume(2);
    volume.strike(Some("node-1"), Effect::Full);
    volume.write(file, 0, &[2; 2 * SECTOR], true).unwrap();
    assert_eq!(volume.write(file, SECTOR as u64, &[2; 2 * SECTOR], true), Err(VolumeError::Full));
    assert_eq!(volume.grow(file, 3 * SECTOR as u64), Err(VolumeError::Full));
    assert_eq!(volume.make(directory, "new", false), Err(VolumeError::Full));
    volume.rename(directory, "file", "renamed").unwrap();
    volume.strike(Some("node-1"), Effect::Free);
    volume.grow(file, 3 * SECTOR as u64).unwrap();
    assert_eq!((values(&mut volume, file), volume.stats().refused), (vec![2, 2, 0], 3));
}

#[test]
fn a_lying_volume_makes_nothing_durable() {
    let (mut volume, directory, file) = volume(2);
    volume.strike(None, Effect::Lie);
    volume.write(file, 0, &[2; SECTOR], true).unwrap();
    volume.flush(file).unwrap();
    volume.rename(directory, "file", "renamed").unwrap();
    volume.flush_names(directory).unwrap();
    assert_eq!(volume.stats().lies, 3);
    assert_eq!(values(&mut volume, file), [2, 1]);
    volume.power_on(1, Survival::None);
    assert_eq!((values(&mut volume, file), names(&volume, directory)), (vec![1, 1], vec!["file".to_owned()]));
}
