//! The features of consensus (K) and of reads and clients (R) that the project promises, each with what proves it.

use super::Entry;

pub(super) const ROWS: &[Entry] = &[
    (
        "K1",
        "a leader is elected; term and vote are durable before anything is said in their name",
        &[
            "engine/tests/scripts/election.txt",
            "engine/tests/scripts/election_restart.txt",
            "engine/src/raft/simulation.rs: unsafe_bugs_end_in_a_disagreement_between_nodes",
        ],
    ),
    (
        "K1",
        "the three rules of terms",
        &["engine/tests/scripts/thesis_3_3_terms.txt", "engine/tests/scripts/stale_leader.txt"],
    ),
    (
        "K2",
        "committed is what a majority has made durable, and followers are told at once",
        &[
            "engine/tests/scripts/replication_slow_leader_disk.txt",
            "engine/src/raft/simulation/model/search.rs: no_run_of_a_small_cluster_breaks_an_invariant",
            "tests/tests/cluster.rs: all_members_killed_at_once_recover_everything_that_was_acknowledged",
        ],
    ),
    (
        "K3",
        "the leader's disk writes while the others do",
        &[
            "engine/tests/scripts/replication_slow_leader_disk.txt",
            "engine/tests/scripts/rounds_slow_disk.txt",
        ],
    ),
    (
        "K4",
        "pre-vote, check-quorum, stickiness",
        &[
            "engine/tests/scripts/election_stickiness.txt",
            "engine/tests/scripts/election_check_quorum.txt",
            "engine/tests/scripts/election_stale_log.txt",
        ],
    ),
    ("K4", "priority", &["tests/tests/driver.rs: the_member_of_the_highest_priority_campaigns_first"]),
    (
        "K5",
        "leadership is transferred, and a transfer that fails is given up at once",
        &[
            "engine/tests/scripts/transfer.txt",
            "tests/tests/driver.rs: leadership_goes_where_it_is_asked_to_and_no_command_is_lost_on_the_way",
            "tests/tests/driver.rs: commands_are_refused_while_leadership_is_on_its_way_and_taken_again_when_it_stays",
            "tests/tests/driver.rs: a_transfer_that_cannot_be_says_why",
        ],
    ),
    (
        "K5",
        "on removal and on shutdown",
        &[
            "engine/tests/scripts/membership_leader_removed.txt",
            "tests/tests/driver.rs: a_leader_that_shuts_down_hands_over_first_and_its_last_commands_are_committed",
            "tests/tests/driver.rs: a_leader_that_shuts_down_alone_does_not_wait_for_anybody",
        ],
    ),
    (
        "K6",
        "joint consensus: add, remove and replace in one call, with a dry run",
        &[
            "engine/tests/scripts/membership_joint.txt",
            "tests/tests/driver/membership.rs: k6_a_member_is_replaced_in_one_call_while_commands_commit",
            "tests/tests/driver/membership.rs: k6_whoever_leads_next_finishes_a_change_wherever_the_leader_dies",
        ],
    ),
    (
        "K6",
        "learners, promoted when they have caught up",
        &[
            "engine/tests/scripts/membership_grow.txt",
            "engine/tests/scripts/membership_stuck.txt",
            "engine/tests/scripts/thesis_4_2_1_rounds.txt",
            "tests/tests/driver/membership.rs: k6_learners_have_the_log_and_no_vote_are_promoted_and_demoted_and_all_of_it_survives_restarts",
        ],
    ),
    (
        "K6",
        "the leader can be removed",
        &[
            "tests/tests/driver/membership.rs: k6_a_leader_removes_itself_leads_until_that_is_committed_and_another_one_follows",
        ],
    ),
    (
        "K6",
        "compare-and-set, one change at a time, and refusals that say what to do",
        &[
            "engine/tests/scripts/membership_refused.txt",
            "tests/tests/driver/membership.rs: k6_changes_that_contradict_themselves_or_the_cluster_are_refused_with_the_cure",
            "tests/tests/driver/membership.rs: k6_a_second_change_is_refused_while_one_is_under_way_and_a_stuck_newcomer_stays_a_learner",
        ],
    ),
    (
        "K7",
        "a single node runs and commits alone, and later joiners are caught up",
        &[
            "engine/tests/scripts/election_single.txt",
            "tests/tests/driver/membership.rs: k7_a_single_node_runs_and_commits_alone_and_later_joiners_are_caught_up_and_vote",
            "tests/tests/driver/membership.rs: k7_a_joiner_that_is_down_or_never_started_is_named_and_nothing_has_changed",
            "tests/tests/cluster.rs: a_cluster_grows_from_one_process_to_three_and_replaces_a_lost_one_under_load",
        ],
    ),
    (
        "K8",
        "unique ids are given out by the cluster",
        &[
            "tests/tests/driver/membership.rs: k8_reserved_ids_are_unique_also_across_leaders_and_never_those_of_members_or_former_ones",
        ],
    ),
    (
        "K9",
        "snapshots bound the log, and commits never wait for them",
        &[
            "tests/tests/driver/snapshots.rs: the_log_is_bounded_under_constant_load",
            "tests/tests/driver/snapshots.rs: a_follower_behind_the_logs_start_is_caught_up_by_a_snapshot_while_commits_go_on",
            "engine/tests/scripts/snapshot_install.txt",
        ],
    ),
    (
        "K9",
        "an install is chunked, resumable and throttled",
        &[
            "tests/tests/driver/snapshots.rs: a_transfer_goes_on_where_it_stopped_when_the_connection_was_cut",
            "tests/tests/driver/snapshots.rs: a_transfer_goes_on_with_the_next_leader_when_that_has_the_same_snapshot",
            "tests/tests/driver/snapshots.rs: a_transfer_takes_what_it_may_of_the_disk_and_of_the_network_and_no_more",
        ],
    ),
    (
        "K10",
        "elections without a log",
        &[
            "engine/tests/scripts/consensus_only.txt",
            "tests/tests/driver.rs: a_cluster_that_only_elects_has_one_leader_at_a_time_and_takes_no_commands",
        ],
    ),
    (
        "K11",
        "heartbeats when idle, none when traffic shows as much",
        &["engine/tests/scripts/heartbeat_suppressed.txt"],
    ),
    (
        "K11",
        "the last activity of each follower",
        &[
            "tests/tests/driver.rs: k11_a_leader_tells_when_it_last_heard_each_member_and_when_it_last_sent_to_it",
        ],
    ),
    (
        "K11",
        "peers that do not read, write or answer in time are given up",
        &[
            "net/tests/strangers.rs: a_silent_peer_is_given_up_and_so_is_one_that_never_reads",
            "net/tests/strangers.rs: a_frame_that_crawls_is_cut_off_though_bytes_keep_coming",
            "net/tests/sessions.rs: nodes_with_nothing_to_say_keep_their_session",
        ],
    ),
    (
        "K12",
        "all initial members agree before any vote",
        &[
            "engine/src/formation.rs: the_lowest_id_composes_when_all_have_met_and_the_others_adopt_the_same",
            "engine/src/formation.rs: a_peer_that_left_before_all_met_must_be_met_again",
            "engine/src/formation.rs: a_wiped_directory_is_refused_also_that_of_the_composer",
            "tests/tests/driver.rs: a_shutdown_asked_while_the_cluster_forms_ends_the_node_in_good_order",
        ],
    ),
    (
        "K12",
        "join, replace and remove, each error with its cure",
        &[
            "engine/src/formation.rs: a_node_that_joins_never_composes_and_takes_over_what_names_others",
            "engine/src/formation.rs: different_member_lists_are_told",
            "engine/src/runtime/error.rs: errors_name_their_cure",
            "tests/tests/driver.rs: a_node_is_told_when_its_members_are_not_those_that_the_cluster_was_formed_with",
            "tests/tests/driver/membership.rs: k12_a_wiped_disk_under_an_old_id_is_refused_and_comes_back_as_a_learner_after_the_old_one_was_removed",
            "bench/tests/cli.rs: a_directory_of_another_node_or_cluster_is_refused",
        ],
    ),
    (
        "R1",
        "linearizable reads through the log, by a round and by a lease, on the leader and on followers",
        &[
            "tests/tests/driver/reads.rs: a_read_through_the_log_commits_an_entry_without_a_command_and_only_the_leader_can",
            "tests/tests/driver/reads.rs: a_query_sees_every_command_that_was_acknowledged_before_on_the_leader_and_on_followers",
            "tests/tests/driver/reads.rs: a_leader_with_a_lease_answers_without_hearing_anybody_for_as_long_as_it_lasts_and_not_longer",
            "engine/src/raft/simulation/reads.rs: known_bugs_of_reads_are_caught_when_they_are_put_back",
        ],
    ),
    (
        "R1",
        "local reads of bounded staleness",
        &[
            "tests/tests/driver/reads.rs: a_stale_read_asks_nobody_and_is_refused_once_the_leader_has_been_silent_for_too_long",
            "tests/tests/driver/reads.rs: a_stale_read_is_refused_while_more_is_known_to_be_committed_than_is_applied_here",
        ],
    ),
    (
        "R2",
        "a barrier waits for a commit of the leader's term",
        &[
            "tests/tests/driver/reads.rs: a_read_through_the_log_commits_an_entry_without_a_command_and_only_the_leader_can",
            "engine/tests/scripts/read_new_leader.txt",
        ],
    ),
    (
        "R2",
        "a round can be forced, and a commit waited for",
        &[
            "tests/tests/driver/reads.rs: a_forced_round_is_answered_by_a_majority_and_only_on_the_leader",
            "tests/tests/driver/reads.rs: commit_and_apply_of_an_index_can_be_waited_for_on_any_node_and_only_for_so_long",
        ],
    ),
    (
        "R3",
        "sessions in the log: each command once, replies kept, expiry by the log's clock",
        &[
            "tests/tests/driver/sessions.rs: a_command_that_is_proposed_again_across_a_failover_is_applied_exactly_once",
            "tests/tests/driver/sessions.rs: a_silent_session_expires_by_the_logs_clock_and_so_equally_on_members_with_any_clock",
            "tests/tests/driver/sessions.rs: random_clients_on_random_failures_get_each_command_applied_at_most_once_and_as_they_were_told",
            "tests/tests/driver/sessions.rs: each_bug_of_sessions_that_is_put_back_is_noticed",
        ],
    ),
    (
        "R3",
        "an unknown outcome can be resolved",
        &[
            "tests/tests/driver/sessions.rs: what_was_resolved_as_never_applied_is_refused_when_it_arrives_late",
            "engine/src/proposals.rs: when_leadership_ends_the_sealed_are_unknown_and_the_others_come_back",
        ],
    ),
];
