//! The promises of a reuse-port group, kept by the running kernel.
//!
//! Clients are plain loopback connections: once `connect` has returned, the connection waits in some
//! slot's queue. Tests of exact turns need the right to load eBPF and say so when they have to be skipped.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a panic or a line is the report")]

mod common;

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use common::{helper_in, is_root, world_readable_copy};
use polyfork_sys::reuseport::{
    BindStep, Group, Options, Rescued, Selection, Want, bind_listener, ensure_free, local_addr,
};

/// Long enough for anything on loopback; only a failing test waits for it.
const PATIENCE: Duration = Duration::from_secs(60);

fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

fn group(slots: &[u32], want: Want) -> Group {
    Group::bind(loopback(), &Options::default(), slots, want).unwrap()
}

/// A group with exact turns, or `None` with the reason printed.
fn exact(slots: &[u32]) -> Option<Group> {
    let group = group(slots, Want::Auto);
    if group.selection() == Selection::Ebpf {
        return Some(group);
    }
    println!("skipped: {}", group.fallback_reason().unwrap());
    None
}

fn connect(address: SocketAddr, count: usize) -> Vec<TcpStream> {
    let connect = |_| TcpStream::connect_timeout(&address, PATIENCE).unwrap();
    (0..count).map(connect).collect()
}

fn depths(group: &Group) -> BTreeMap<u32, u32> {
    group.slots().map(|slot| (slot, group.queue_depth(slot).unwrap())).collect()
}

/// Accepts all that waits on a slot and answers each with the slot's number.
fn serve(group: &Group, slot: u32) -> usize {
    let listener = group.listener(slot).unwrap().try_clone_to_owned().unwrap();
    let listener = TcpListener::from(listener);
    let mut served = 0;
    loop {
        match listener.accept() {
            Ok((mut stream, _)) => {
                stream.write_all(&slot.to_le_bytes()).unwrap();
                served += 1;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return served,
            Err(error) => panic!("accept on slot {slot}: {error}"),
        }
    }
}

/// Which slots answered these clients. Panics when one was reset.
fn answers(clients: Vec<TcpStream>) -> BTreeMap<u32, usize> {
    let mut counts = BTreeMap::new();
    for mut client in clients {
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut slot = [0; 4];
        client.read_exact(&mut slot).unwrap();
        *counts.entry(u32::from_le_bytes(slot)).or_insert(0) += 1;
    }
    counts
}

#[test]
fn thirty_connections_over_three_slots_queue_ten_each() {
    let Some(mut group) = exact(&[1, 2, 3]) else { return };
    group.set_live(&[1, 2, 3]).unwrap();
    let clients = connect(group.address(), 30);
    assert_eq!(depths(&group), BTreeMap::from([(1, 10), (2, 10), (3, 10)]));
    assert_eq!(group.turns(), Some(30));
    for slot in [1, 2, 3] {
        assert_eq!(serve(&group, slot), 10);
    }
    assert_eq!(answers(clients), BTreeMap::from([(1, 10), (2, 10), (3, 10)]));
}

#[test]
fn one_turn_counts_for_both_protocols_of_a_wildcard() {
    let any = SocketAddr::from(([0u16; 8], 0));
    let group = match Group::bind(any, &Options::default(), &[1, 2, 3], Want::Auto) {
        Err(error) if error.step == BindStep::Socket => {
            println!("skipped: {error}");
            return;
        }
        result => result.unwrap(),
    };
    if group.selection() == Selection::Classic {
        println!("skipped: {}", group.fallback_reason().unwrap());
        return;
    }
    let mut group = group;
    group.set_live(&[1, 2, 3]).unwrap();
    let port = group.address().port();
    let mut clients = Vec::new();
    for _ in 0..15 {
        clients.extend(connect(SocketAddr::from(([127, 0, 0, 1], port)), 1));
        clients.extend(connect(SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, port)), 1));
    }
    assert_eq!(depths(&group), BTreeMap::from([(1, 10), (2, 10), (3, 10)]));
    // And a queue with both kinds in it can be moved.
    group.set_live(&[1, 3]).unwrap();
    assert_eq!(group.rescue(2).unwrap(), Rescued::Moved(10));
    assert_eq!(serve(&group, 1) + serve(&group, 3), 30);
    assert_eq!(answers(clients), BTreeMap::from([(1, 15), (3, 15)]));
}

#[test]
fn turns_stay_exact_when_many_connect_at_once() {
    let Some(mut group) = exact(&[1, 2, 3, 4, 5]) else { return };
    group.set_live(&[1, 2, 3, 4, 5]).unwrap();
    let address = group.address();
    let clients: Vec<_> = (0..8).map(|_| thread::spawn(move || connect(address, 50))).collect();
    let clients: Vec<_> = clients.into_iter().flat_map(|client| client.join().unwrap()).collect();
    assert_eq!(depths(&group).into_values().collect::<Vec<_>>(), [80; 5]);
    drop(clients);
}

#[test]
fn a_change_of_the_live_set_holds_from_the_next_connection_on() {
    let Some(mut group) = exact(&[1, 2, 3]) else { return };
    let mut clients = Vec::new();
    for (live, expected) in [
        (&[1][..], [6, 0, 0]),
        (&[2, 3], [6, 3, 3]),
        (&[1, 2, 3], [8, 5, 5]),
        (&[3], [8, 5, 11]),
        // Named twice: two turns of three.
        (&[1, 1, 2], [12, 7, 11]),
    ] {
        group.set_live(live).unwrap();
        assert_eq!(group.live(), live);
        clients.extend(connect(group.address(), 6));
        assert_eq!(depths(&group).into_values().collect::<Vec<_>>(), expected, "live {live:?}");
        let given = [1, 2, 3].map(|slot| group.given(slot).unwrap());
        assert_eq!(given, expected.map(u64::from), "live {live:?}");
    }
}

#[test]
fn without_a_live_slot_connections_still_queue_somewhere() {
    for want in [Want::Auto, Want::Classic] {
        let group = group(&[1, 2, 3], want);
        let _clients = connect(group.address(), 30);
        assert_eq!(depths(&group).values().sum::<u32>(), 30);
    }
}

#[test]
fn a_single_slot_is_a_group_too() {
    for want in [Want::Auto, Want::Classic] {
        let mut group = group(&[7], want);
        group.set_live(&[7]).unwrap();
        let clients = connect(group.address(), 5);
        assert_eq!(serve(&group, 7), 5);
        assert_eq!(answers(clients), BTreeMap::from([(7, 5)]));
        // And it can grow.
        group.add_slot(8).unwrap();
        group.set_live(&[8]).unwrap();
        let _clients = connect(group.address(), 5);
        assert_eq!(depths(&group), BTreeMap::from([(7, 0), (8, 5)]));
    }
}

#[test]
fn a_rescued_queue_is_answered_by_the_others_and_the_slot_can_come_back() {
    let Some(mut group) = exact(&[1, 2, 3]) else { return };
    group.set_live(&[1, 2, 3]).unwrap();
    let clients = connect(group.address(), 30);
    group.set_live(&[1, 3]).unwrap();
    assert_eq!(group.rescue(2).unwrap(), Rescued::Moved(10));
    assert_eq!(depths(&group), BTreeMap::from([(1, 15), (2, 0), (3, 15)]));
    assert_eq!(serve(&group, 1) + serve(&group, 3), 30);
    assert_eq!(answers(clients), BTreeMap::from([(1, 15), (3, 15)]));
    // The same socket listens again; a worker's copy of it is still good.
    group.set_live(&[2]).unwrap();
    let clients = connect(group.address(), 4);
    assert_eq!(serve(&group, 2), 4);
    assert_eq!(answers(clients), BTreeMap::from([(2, 4)]));
}

/// The fault: the first socket, whose port the kernel had chosen, listened on another port afterwards.
#[test]
fn any_slot_can_be_rescued_and_come_back_on_the_same_port() {
    let Some(mut group) = exact(&[1, 2, 3]) else { return };
    for slot in [1, 2, 3, 1] {
        group.set_live(&[1, 2, 3]).unwrap();
        let clients = connect(group.address(), 9);
        let others: Vec<u32> = [1, 2, 3].into_iter().filter(|one| *one != slot).collect();
        group.set_live(&others).unwrap();
        assert_eq!(group.rescue(slot).unwrap(), Rescued::Moved(3));
        assert_eq!(local_addr(group.listener(slot).unwrap()).unwrap(), group.address());
        group.set_live(&[slot]).unwrap();
        let more = connect(group.address(), 2);
        assert_eq!(serve(&group, slot), 2);
        assert_eq!(others.iter().map(|slot| serve(&group, *slot)).sum::<usize>(), 9);
        assert_eq!(answers(clients).values().sum::<usize>(), 9);
        drop(more);
    }
}

#[test]
fn rescue_is_refused_where_it_would_reset_connections() {
    let mut group = group(&[1, 2], Want::Auto);
    group.set_live(&[1]).unwrap();
    let clients = connect(group.address(), 3);
    assert_eq!(group.rescue(1).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    group.set_live(&[]).unwrap();
    assert_eq!(group.rescue(1).unwrap(), Rescued::NotPossible);
    assert_eq!(group.rescue(9).unwrap_err().kind(), io::ErrorKind::NotFound);
    assert_eq!(serve(&group, 1), 3);
    assert_eq!(answers(clients), BTreeMap::from([(1, 3)]));
}

#[test]
fn removing_a_slot_loses_none_of_its_queue_even_if_a_worker_holds_a_copy() {
    let Some(mut group) = exact(&[1, 2, 3]) else { return };
    group.set_live(&[1, 2, 3]).unwrap();
    let held = group.listener(2).unwrap().try_clone_to_owned().unwrap();
    let clients = connect(group.address(), 30);
    group.remove_slot(2).unwrap();
    assert_eq!(group.live(), [1, 3]);
    assert!(group.listener(2).is_none());
    assert_eq!(depths(&group), BTreeMap::from([(1, 15), (3, 15)]));
    let more = connect(group.address(), 10);
    assert_eq!(serve(&group, 1) + serve(&group, 3), 40);
    assert_eq!(answers(clients).values().sum::<usize>(), 30);
    assert_eq!(answers(more).values().sum::<usize>(), 10);
    let copy = TcpListener::from(held);
    assert_eq!(copy.accept().unwrap_err().raw_os_error(), Some(libc::EINVAL));
}

#[test]
fn a_slot_that_leaves_and_comes_back_takes_exact_turns_again() {
    let Some(mut group) = exact(&[1, 2, 3]) else { return };
    for _ in 0..20 {
        group.remove_slot(2).unwrap();
        group.add_slot(2).unwrap();
        assert_eq!(group.given(2), Some(0), "a new socket has been given nothing");
        group.set_live(&[1, 2, 3]).unwrap();
        let clients = connect(group.address(), 9);
        let served: Vec<_> = [1, 2, 3].into_iter().map(|slot| serve(&group, slot)).collect();
        assert_eq!(served, [3, 3, 3]);
        drop(clients);
    }
}

#[test]
fn the_last_slot_cannot_be_removed() {
    let mut group = group(&[1], Want::Auto);
    assert_eq!(group.remove_slot(1).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    let _clients = connect(group.address(), 1);
}

#[test]
fn stray_packets_do_not_shift_the_turns() {
    let Some(mut group) = exact(&[1, 2]) else { return };
    group.set_live(&[1, 2]).unwrap();
    let address = group.address();
    let raw = socket2::Socket::new(
        socket2::Domain::IPV4,
        socket2::Type::RAW,
        Some(socket2::Protocol::TCP),
    );
    let Ok(raw) = raw else {
        println!("skipped: no right to open a raw socket");
        return;
    };
    let mut clients = Vec::new();
    for _ in 0..10 {
        clients.extend(connect(address, 1));
        // A bare ACK of no connection: it reaches the listener's program like a cookie's answer would.
        raw.send_to(&stray_ack(address.port()), &address.into()).unwrap();
    }
    assert_eq!(depths(&group), BTreeMap::from([(1, 5), (2, 5)]));
    assert_eq!(group.turns(), Some(10));
}

/// A TCP header with only ACK set, from loopback to loopback, checksum included.
fn stray_ack(port: u16) -> [u8; 20] {
    let mut header = [0u8; 20];
    header[0..2].copy_from_slice(&9u16.to_be_bytes());
    header[2..4].copy_from_slice(&port.to_be_bytes());
    header[4..8].copy_from_slice(&1u32.to_be_bytes());
    header[8..12].copy_from_slice(&1u32.to_be_bytes());
    header[12] = 5 << 4;
    header[13] = 0x10;
    header[14..16].copy_from_slice(&1024u16.to_be_bytes());
    let pseudo = [127, 0, 0, 1, 127, 0, 0, 1, 0, 6, 0, 20];
    let words = pseudo.iter().chain(&header).copied().collect::<Vec<u8>>();
    let sum: u32 =
        words.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !((folded & 0xffff) + (folded >> 16)) as u16;
    header[16..18].copy_from_slice(&checksum.to_be_bytes());
    header
}

#[test]
fn classic_spreads_over_the_live_slots_and_never_to_a_dead_one() {
    let mut group = group(&[1, 2, 3, 4], Want::Classic);
    assert_eq!(group.selection(), Selection::Classic);
    assert!(group.fallback_reason().is_none());
    assert_eq!(group.turns(), None);
    for live in [&[1, 2, 3, 4][..], &[2, 4], &[3], &[4, 1, 2]] {
        group.set_live(live).unwrap();
        let clients = connect(group.address(), 200);
        let queued = depths(&group);
        println!("live {live:?}: {queued:?}");
        for (slot, depth) in queued {
            let expected = if live.contains(&slot) { 200 / live.len() as u32 } else { 0 };
            // More than five standard deviations: not in a million runs by chance.
            assert!(depth.abs_diff(expected) <= 40, "slot {slot}: {depth}, expected {expected}");
            assert!(depth == 0 || live.contains(&slot));
            serve(&group, slot);
        }
        assert_eq!(answers(clients).values().sum::<usize>(), 200);
    }
}

#[test]
fn classic_follows_the_kernel_when_a_slot_in_the_middle_leaves() {
    let mut group = group(&[1, 2, 3, 4, 5], Want::Classic);
    let check = |group: &mut Group| {
        for slot in group.slots().collect::<Vec<_>>() {
            group.set_live(&[slot]).unwrap();
            let clients = connect(group.address(), 3);
            assert_eq!(group.queue_depth(slot).unwrap(), 3, "slot {slot}");
            serve(group, slot);
            drop(clients);
        }
    };
    for (leaves, joins) in [(2, 2), (1, 9), (5, 1), (3, 7), (9, 2)] {
        group.set_live(&[4]).unwrap();
        group.remove_slot(leaves).unwrap();
        check(&mut group);
        group.add_slot(joins).unwrap_or_else(|_| group.add_slot(leaves).unwrap());
        check(&mut group);
    }
}

#[test]
fn classic_keeps_a_slot_whose_queue_cannot_be_moved() {
    let mut group = group(&[1, 2], Want::Classic);
    group.set_live(&[1]).unwrap();
    let clients = connect(group.address(), 4);
    let error = group.remove_slot(1).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
    assert_eq!(error.to_string(), "4 connections wait in the queue of slot 1");
    assert_eq!(group.rescue(1).unwrap(), Rescued::NotPossible);
    assert_eq!(serve(&group, 1), 4);
    group.remove_slot(1).unwrap();
    assert_eq!(answers(clients), BTreeMap::from([(1, 4)]));
}

#[test]
fn a_second_group_gets_address_in_use() {
    for first in [Want::Auto, Want::Classic] {
        let one = group(&[1, 2], first);
        for second in [Want::Auto, Want::Classic] {
            let slots = [1, 2, 3];
            let error = Group::bind(one.address(), &Options::default(), &slots, second);
            let error = error.unwrap_err();
            assert!(error.is_in_use(), "{error:?}");
            let expected = format!("cannot listen on {}: address already in use", one.address());
            assert_eq!(error.to_string(), expected);
        }
        assert!(ensure_free(one.address(), &Options::default()).unwrap_err().is_in_use());
        assert!(bind_listener(one.address(), &Options::default()).unwrap_err().is_in_use());
    }
}

#[test]
fn a_group_does_not_join_a_plain_listener_or_a_wildcard() {
    let plain = bind_listener(loopback(), &Options::default()).unwrap();
    let address = local_addr(plain.as_fd()).unwrap();
    assert!(Group::bind(address, &Options::default(), &[1], Want::Auto).unwrap_err().is_in_use());
    for wildcard in ["0.0.0.0", "[::]"] {
        let address = format!("{wildcard}:{}", address.port()).parse().unwrap();
        let second = Group::bind(address, &Options::default(), &[1, 2], Want::Auto);
        assert!(second.unwrap_err().is_in_use(), "{wildcard}");
    }
}

#[test]
fn of_many_that_start_at_once_exactly_one_gets_the_port() {
    let rivals = 20;
    let rounds = 30;
    for _ in 0..rounds {
        // A port that was free a moment ago.
        let probe = bind_listener(loopback(), &Options::default()).unwrap();
        let address = local_addr(probe.as_fd()).unwrap();
        drop(probe);
        let start = Arc::new(Barrier::new(rivals));
        let tries: Vec<_> = (0..rivals)
            .map(|rival| {
                let start = Arc::clone(&start);
                thread::spawn(move || {
                    let want = if rival % 2 == 0 { Want::Auto } else { Want::Classic };
                    let slots: Vec<u32> = (1..=1 + rival as u32 % 3).collect();
                    start.wait();
                    Group::bind(address, &Options::default(), &slots, want)
                })
            })
            .collect();
        let results: Vec<_> = tries.into_iter().map(|one| one.join().unwrap()).collect();
        let winners = results.iter().filter(|result| result.is_ok()).count();
        for error in results.iter().filter_map(|result| result.as_ref().err()) {
            assert!(error.is_in_use(), "{error:?}");
        }
        assert_eq!(winners, 1);
    }
}

#[test]
fn the_port_is_free_again_as_soon_as_the_group_is_gone() {
    let mut one = group(&[1, 2], Want::Auto);
    one.set_live(&[1, 2]).unwrap();
    let address = one.address();
    let clients = connect(address, 4);
    serve(&one, 1);
    serve(&one, 2);
    // The accepted ones were closed by us: they stay in TIME_WAIT.
    drop((one, clients));
    Group::bind(address, &Options::default(), &[1, 2], Want::Auto).unwrap();
}

#[test]
fn an_ipv6_wildcard_takes_ipv4_unless_told_not_to() {
    let any = SocketAddr::from(([0u16; 8], 0));
    let group = match Group::bind(any, &Options::default(), &[1, 2], Want::Auto) {
        Err(error) if error.step == BindStep::Socket => {
            println!("skipped: {error}");
            return;
        }
        result => result.unwrap(),
    };
    let v4 = SocketAddr::from(([127, 0, 0, 1], group.address().port()));
    let _clients = connect(v4, 2);
    let _more = connect(SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, v4.port())), 2);
    assert_eq!(depths(&group).values().sum::<u32>(), 4);
    let v4_any = SocketAddr::from(([0; 4], v4.port()));
    let both = Group::bind(v4_any, &Options::default(), &[1], Want::Auto);
    assert!(both.unwrap_err().is_in_use());
    drop(group);

    let only = Options { ipv6_only: true, ..Options::default() };
    let group = Group::bind(any, &only, &[1, 2], Want::Auto).unwrap();
    let v4 = SocketAddr::from(([127, 0, 0, 1], group.address().port()));
    assert!(TcpStream::connect_timeout(&v4, PATIENCE).is_err());
    let v4_any = SocketAddr::from(([0; 4], v4.port()));
    Group::bind(v4_any, &Options::default(), &[1], Want::Auto).unwrap();
}

#[test]
fn wrong_slots_are_refused_before_anything_is_bound() {
    let refused = |slots: &[u32]| {
        let error = Group::bind(loopback(), &Options::default(), slots, Want::Auto).unwrap_err();
        assert_eq!(error.step, BindStep::Input);
        error.to_string()
    };
    assert!(refused(&[]).ends_with("0 slots, 1 to 4096 are possible"));
    assert!(refused(&[1, 2, 1]).ends_with("slot 1 is named twice"));
    let mut group = group(&[1, 2], Want::Auto);
    assert_eq!(group.set_live(&[1, 3]).unwrap_err().kind(), io::ErrorKind::NotFound);
    assert_eq!(group.live(), [0u32; 0]);
    assert_eq!(group.add_slot(1).unwrap_err().kind(), io::ErrorKind::InvalidInput);
}

#[test]
fn two_hundred_slots_work() {
    let slots: Vec<u32> = (1..=200).collect();
    let Some(mut group) = exact(&slots) else { return };
    group.set_live(&slots).unwrap();
    let _clients = connect(group.address(), 400);
    assert!(depths(&group).values().all(|depth| *depth == 2));
}

#[test]
fn a_socket_that_a_worker_has_shut_down_is_revived() {
    for want in [Want::Auto, Want::Classic] {
        let mut group = group(&[1, 2, 3], want);
        group.set_live(&[1, 3]).unwrap();
        let copy = group.listener(1).unwrap().try_clone_to_owned().unwrap();
        rustix::net::shutdown(&copy, rustix::net::Shutdown::Read).unwrap();
        group.set_live(&[3]).unwrap();
        assert_eq!(group.rescue(1).unwrap(), Rescued::Moved(0));
        for slot in [1, 2, 3] {
            group.set_live(&[slot]).unwrap();
            let clients = connect(group.address(), 3);
            assert_eq!(serve(&group, slot), 3, "slot {slot}, {want:?}");
            drop(clients);
        }
    }
}

/// Each connection of a machine under a SYN flood asks the program twice: for the SYN, and for the ACK
/// that brings back the cookie. With one counter for both, all would fall on one of two slots.
#[test]
fn turns_stay_exact_when_the_kernel_answers_with_cookies() {
    if exact(&[1]).is_none() {
        return;
    }
    // The switch for cookies belongs to a network namespace: make one for a thread.
    let test = || {
        if !enter_own_network() {
            println!("skipped: no right to make a network namespace");
            return;
        }
        std::fs::write("/proc/sys/net/ipv4/tcp_syncookies", "2").unwrap();
        let mut group = group(&[1, 2], Want::Ebpf);
        group.set_live(&[1, 2]).unwrap();
        let clients = connect(group.address(), 40);
        assert_eq!(depths(&group), BTreeMap::from([(1, 20), (2, 20)]));
        // A rescue works on what cookies brought, too.
        group.set_live(&[1]).unwrap();
        assert_eq!(group.rescue(2).unwrap(), Rescued::Moved(20));
        assert_eq!(serve(&group, 1), 40);
        assert_eq!(answers(clients), BTreeMap::from([(1, 40)]));
    };
    thread::spawn(test).join().unwrap();
}

/// Moves this thread into a network namespace of its own that has only loopback.
fn enter_own_network() -> bool {
    // SAFETY: affects the calling thread alone, which opens its sockets afterwards.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } == -1 {
        return false;
    }
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    // SAFETY: a structure of plain numbers and bytes.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    let number = std::os::fd::AsRawFd::as_raw_fd(&socket);
    // SAFETY: the request names an interface and carries its new flags, as netdevice(7) wants.
    unsafe { libc::ioctl(number, libc::SIOCSIFFLAGS, &raw const request) == 0 }
}

#[test]
fn without_privilege_auto_falls_back_to_classic_and_says_why() {
    if !is_root() {
        println!("skipped: starts as root");
        return;
    }
    let copy = world_readable_copy();
    let mut command = helper_in(&copy, "helper_is_not_privileged");
    command.uid(65534).gid(65534).groups(&[]);
    assert!(command.spawn().unwrap().wait().unwrap().success());
}

#[test]
#[ignore = "run by without_privilege_auto_falls_back_to_classic_and_says_why"]
fn helper_is_not_privileged() {
    assert_eq!(rustix::process::geteuid().as_raw(), 65534);
    let one = group(&[1, 2, 3], Want::Auto);
    assert_eq!(one.selection(), Selection::Classic);
    let reason = one.fallback_reason().unwrap();
    assert!(reason.is_not_permitted());
    assert!(reason.to_string().ends_with("(CAP_BPF and CAP_NET_ADMIN are needed)"), "{reason}");
    let error = Group::bind(loopback(), &Options::default(), &[1], Want::Ebpf).unwrap_err();
    assert_eq!(error.step, BindStep::Program);
    drop(one);
    // All that a classic group promises holds here.
    classic_spreads_over_the_live_slots_and_never_to_a_dead_one();
    classic_follows_the_kernel_when_a_slot_in_the_middle_leaves();
    classic_keeps_a_slot_whose_queue_cannot_be_moved();
    a_single_slot_is_a_group_too();
    a_second_group_gets_address_in_use();
    of_many_that_start_at_once_exactly_one_gets_the_port();
}

#[test]
fn a_connection_of_ours_reaches_the_slot_it_is_aimed_at_and_takes_no_turn() {
    let Some(mut group) = exact(&[1, 2, 3]) else { return };
    // Nobody is live yet: this is how a worker is looked at before it gets connections.
    let before = group.reach(3).unwrap();
    assert_eq!(depths(&group), BTreeMap::from([(1, 0), (2, 0), (3, 1)]));
    group.set_live(&[1, 2]).unwrap();
    let clients = connect(group.address(), 4);
    let aimed: Vec<_> = (0..3).map(|_| group.reach(3).unwrap()).collect();
    let more = connect(group.address(), 4);
    assert_eq!(depths(&group), BTreeMap::from([(1, 4), (2, 4), (3, 4)]));
    assert_eq!((group.turns(), group.given(3)), (Some(8), Some(0)));
    drop((before, clients, aimed, more));
    let error = group.reach(9).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
}

#[test]
fn a_classic_group_cannot_be_aimed_at() {
    let group = group(&[1, 2], Want::Classic);
    assert_eq!(group.reach(1).unwrap_err().kind(), io::ErrorKind::Unsupported);
}
