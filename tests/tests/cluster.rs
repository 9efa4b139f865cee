//! Real processes, real disk, real sockets, real kills: nothing that was acknowledged is lost. On each backend.

use anyhow::{Result, bail};
use ringraft::runtime::Backend;
use ringraft_tests::process::{Cluster, ENGINE_FLAGS, EngineFlags, Program};
use std::net::TcpListener;
use std::time::{Duration, Instant};

ringraft_tests::on_each_backend! {
    a_leader_killed_under_load_is_replaced_and_nothing_acknowledged_is_lost
    a_follower_killed_under_load_costs_nothing_and_catches_up_when_it_returns
    all_members_killed_at_once_recover_everything_that_was_acknowledged
    a_single_member_serves_alone_and_recovers_alone
    a_member_waits_for_its_port_while_a_killed_process_may_still_have_it
    a_cluster_grows_from_one_process_to_three_and_replaces_a_lost_one_under_load
}

fn flags(backend: Backend) -> EngineFlags {
    EngineFlags { backend, ..ENGINE_FLAGS }
}

fn cluster(backend: Backend, count: u64) -> Result<Cluster> {
    Cluster::start(env!("CARGO_BIN_EXE_testnode"), flags(backend), env!("CARGO_TARGET_TMPDIR"), count)
}

/// Members of one cluster may differ in their backend, and change it when they restart.
#[test]
fn members_on_different_backends_are_one_cluster_and_read_each_others_logs() -> Result<()> {
    let mut cluster = cluster(Backend::Glommio, 3)?;
    for (round, id) in (1..).zip([1, 2, 3, 1, 2, 3]) {
        load_for(&mut cluster, round * 1_000, 500)?;
        cluster.kill(id)?;
        let backend = if round <= 3 { Backend::Uring } else { Backend::Glommio };
        cluster.set_engine(flags(backend));
        cluster.restart(id)?;
        cluster.wait_leader()?;
        cluster.verify()?;
    }
    Ok(())
}

/// Puts the load, on streams of their own, on whoever leads now.
fn load(cluster: &mut Cluster, first_stream: u64) -> Result<u64> {
    let leader = cluster.wait_leader()?;
    cluster.order(leader, &format!("load {first_stream} 64"))?;
    Ok(leader)
}

/// Puts the load on whoever leads until so many more commands are acknowledged. On a busy machine leadership may move meanwhile.
fn load_for(cluster: &mut Cluster, first_stream: u64, more: usize) -> Result<()> {
    let wanted = cluster.ledger().acked.len() + more;
    for attempt in 0..10 {
        let leader = load(cluster, first_stream + attempt * 64)?;
        while cluster.ledger().acked.len() < wanted && cluster.status(leader)?.role == "Leader" {
            std::thread::sleep(Duration::from_millis(5));
        }
        cluster.stop_load(leader)?;
        if cluster.ledger().acked.len() >= wanted {
            return Ok(());
        }
    }
    bail!("{} acknowledged, {wanted} wanted, whoever leads", cluster.ledger().acked.len())
}

/// Asks whoever leads for the change that removes a member. On a busy machine leadership may move meanwhile, with the outcome
/// unknown: then the next leader is asked, which either makes the change or knows that member no more. It may also not have
/// heard yet of members that have just started.
fn change(cluster: &mut Cluster, words: &[&str]) -> Result<()> {
    let mut attempts = 100;
    loop {
        let leader = cluster.wait_leader()?;
        match cluster.change(leader, words) {
            Ok(_) => return Ok(()),
            Err(error) if error.to_string().contains("is not a member") && attempts < 100 => return Ok(()),
            Err(error) if attempts == 1 => return Err(error),
            Err(_) => attempts -= 1,
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn a_leader_killed_under_load_is_replaced_and_nothing_acknowledged_is_lost(backend: Backend) -> Result<()> {
    let mut cluster = cluster(backend, 3)?;
    let killed = load(&mut cluster, 0)?;
    cluster.wait_acks(2_000)?;
    cluster.kill(killed)?;
    let next = load(&mut cluster, 1_000)?;
    assert_ne!(next, killed);
    cluster.wait_acks(2_000)?;
    cluster.restart(killed)?;
    cluster.wait_acks(2_000)?;
    cluster.stop_load(next)?;
    cluster.verify()?;
    for id in cluster.running() {
        cluster.quit(id)?;
    }
    Ok(())
}

fn a_follower_killed_under_load_costs_nothing_and_catches_up_when_it_returns(backend: Backend) -> Result<()> {
    let mut cluster = cluster(backend, 3)?;
    let leader = load(&mut cluster, 0)?;
    cluster.wait_acks(1_000)?;
    let follower = cluster.running().into_iter().find(|id| *id != leader).expect("three members");
    for _ in 0..2 {
        cluster.kill(follower)?;
        cluster.wait_acks(2_000)?;
        cluster.restart(follower)?;
        cluster.wait_acks(500)?;
    }
    assert_eq!(cluster.wait_leader()?, leader, "a follower that returns does not disturb the leader");
    cluster.stop_load(leader)?;
    cluster.verify()
}

fn all_members_killed_at_once_recover_everything_that_was_acknowledged(backend: Backend) -> Result<()> {
    let mut cluster = cluster(backend, 3)?;
    for round in 0..3 {
        let _leader = load(&mut cluster, round * 1_000)?;
        cluster.wait_acks(1_500)?;
        cluster.kill_all()?;
        for id in 1..=3 {
            cluster.restart(id)?;
        }
        cluster.wait_leader()?;
    }
    // A new leader commits what it found with an entry of its own term.
    cluster.verify()
}

fn a_single_member_serves_alone_and_recovers_alone(backend: Backend) -> Result<()> {
    let mut cluster = cluster(backend, 1)?;
    for round in 0..2 {
        let leader = load(&mut cluster, round * 1_000)?;
        cluster.wait_acks(1_000)?;
        cluster.kill(leader)?;
        cluster.restart(leader)?;
        cluster.wait_leader()?;
    }
    cluster.verify()
}

/// The kernel closes the sockets of a process with operations on a ring some time after the process has gone: whoever starts it
/// again at once was refused. One that is in use for longer is another's.
fn a_member_waits_for_its_port_while_a_killed_process_may_still_have_it(backend: Backend) -> Result<()> {
    let scratch = tempfile::Builder::new().prefix("port-").tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let program = Program { path: env!("CARGO_BIN_EXE_testnode").into(), leading: Vec::new() };
    let mut cluster = Cluster::stopped(program, flags(backend), scratch.path(), 1)?;
    let taken = TcpListener::bind(cluster.address(1))?;
    cluster.spawn(1)?;
    std::thread::sleep(Duration::from_millis(300));
    drop(taken);
    load(&mut cluster, 0)?;
    cluster.wait_acks(10)?;
    cluster.kill(1)?;
    let deadline = Instant::now() + Duration::from_secs(20);
    let _taken = loop {
        match TcpListener::bind(cluster.address(1)) {
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
            bound => break bound?,
        }
    };
    cluster.spawn(1)?;
    let gone = cluster.wait_leader().expect_err("the port stays taken").to_string();
    assert!(gone.contains("the member ended"), "{gone}");
    Ok(())
}

fn a_cluster_grows_from_one_process_to_three_and_replaces_a_lost_one_under_load(
    backend: Backend,
) -> Result<()> {
    let scratch = tempfile::Builder::new().prefix("grows-").tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let program = Program { path: env!("CARGO_BIN_EXE_testnode").into(), leading: Vec::new() };
    let mut cluster = Cluster::stopped(program, flags(backend), scratch.path(), 4)?;
    cluster.start_as(1, &[1], false)?;
    assert_eq!(load(&mut cluster, 0)?, 1);
    cluster.wait_acks(500)?;
    for id in [2, 3] {
        cluster.start_as(id, &[1, id], true)?;
    }
    cluster.change(1, &["add=2,3"])?;
    cluster.wait_acks(500)?;

    // One of the new ones is lost with its directory, another one takes its place.
    cluster.kill(3)?;
    std::fs::remove_dir_all(cluster.data_dir(3))?;
    cluster.start_as(4, &[1, 2, 4], true)?;
    change(&mut cluster, &["add=4", "remove=3"])?;
    cluster.wait_acks(500)?;
    cluster.stop_load(1)?;
    cluster.verify()?;

    // The first one is not needed any more, and comes back with the list of one that it began with.
    cluster.kill(1)?;
    let leader = load(&mut cluster, 1_000)?;
    assert!([2, 4].contains(&leader));
    cluster.wait_acks(500)?;
    cluster.start_as(1, &[1], false)?;
    cluster.wait_acks(500)?;
    cluster.stop_load(leader)?;
    cluster.verify()?;

    // All restart.
    cluster.kill_all()?;
    cluster.start_as(1, &[1], false)?;
    cluster.start_as(2, &[1, 2], true)?;
    cluster.start_as(4, &[1, 2, 4], true)?;
    let leader = load(&mut cluster, 2_000)?;
    cluster.wait_acks(100)?;

    // A leader leaves; the others go on.
    cluster.stop_load(leader)?;
    let remove = format!("remove={leader}");
    change(&mut cluster, &[&remove])?;
    cluster.kill(leader)?;
    let next = load(&mut cluster, 3_000)?;
    assert_ne!(next, leader);
    cluster.wait_acks(100)?;
    cluster.stop_load(next)?;
    cluster.verify()
}
