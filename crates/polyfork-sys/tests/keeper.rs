//! What becomes of a port whose process is gone while somebody else holds its keeper, kept by the running kernel.
//!
//! A process that is killed is played by a group that is dropped: all its sockets are closed in no particular order. Needs the
//! right to load eBPF, and says so when it has to be skipped.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a panic or a line is the report")]

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use polyfork_sys::reuseport::{
    Group, Options, Selection, Want, bind_listener, queue_depth, reuse_alone,
};

const PATIENCE: Duration = Duration::from_secs(60);

fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

fn connect(address: SocketAddr, count: usize) -> Vec<TcpStream> {
    let connect = |_| TcpStream::connect_timeout(&address, PATIENCE).unwrap();
    (0..count).map(connect).collect()
}

/// A group of two live slots, and a copy of its keeper as a service manager has it.
fn kept() -> Option<(Group, OwnedFd)> {
    let mut group = Group::bind(loopback(), &Options::default(), &[1, 2], Want::Auto).unwrap();
    if group.selection() != Selection::Ebpf {
        println!("skipped: {}", group.fallback_reason().unwrap());
        assert_eq!(group.add_keeper().unwrap_err().kind(), ErrorKind::Unsupported);
        return None;
    }
    let copy = group.add_keeper().unwrap().try_clone_to_owned().unwrap();
    group.set_live(&[1, 2]).unwrap();
    Some((group, copy))
}

fn over(keeper: OwnedFd, slots: &[u32]) -> Group {
    Group::over(keeper, &Options::default(), slots).map_err(|failed| failed.0).unwrap()
}

fn depths(group: &Group) -> Vec<u32> {
    group.slots().map(|slot| group.queue_depth(slot).unwrap()).collect()
}

#[test]
fn while_a_slot_is_live_the_keeper_gets_nothing() {
    let Some((mut group, keeper)) = kept() else { return };
    let _clients = connect(group.address(), 40);
    assert_eq!((depths(&group), queue_depth(keeper.as_fd()).unwrap()), (vec![20, 20], 0));
    assert_eq!(group.slots().collect::<Vec<_>>(), [1, 2]);
    // ... and all of it while none is.
    group.set_live(&[]).unwrap();
    let _more = connect(group.address(), 10);
    assert_eq!((depths(&group), queue_depth(keeper.as_fd()).unwrap()), (vec![20, 20], 10));
    assert_eq!(group.empty_keeper().unwrap(), 0, "nobody could take it");
    group.set_live(&[2]).unwrap();
    assert_eq!(group.empty_keeper().unwrap(), 10);
    assert_eq!((depths(&group), queue_depth(keeper.as_fd()).unwrap()), (vec![20, 30], 0));
}

#[test]
fn what_waited_and_what_comes_is_there_for_the_next_process() {
    let Some((group, keeper)) = kept() else { return };
    let address = group.address();
    let mut clients = connect(address, 30);
    drop(group);
    assert_eq!(queue_depth(keeper.as_fd()).unwrap(), 30, "what waited has moved");
    clients.extend(connect(address, 11));
    assert_eq!(queue_depth(keeper.as_fd()).unwrap(), 41, "what comes waits");
    let mut next = over(keeper.try_clone().unwrap(), &[1, 2, 3]);
    assert_eq!(next.address(), address);
    clients.extend(connect(address, 1));
    next.set_live(&[1, 2, 3]).unwrap();
    next.empty_keeper().unwrap();
    assert_eq!(depths(&next), [14, 14, 14]);
    clients.extend(connect(address, 3));
    assert_eq!(depths(&next), [15, 15, 15]);
    // It is no end: the next one can be killed as well.
    drop(next);
    assert_eq!(queue_depth(keeper.as_fd()).unwrap(), 45);
    let mut third = over(keeper, &[1]);
    third.set_live(&[1]).unwrap();
    third.empty_keeper().unwrap();
    assert_eq!(depths(&third), [45]);
}

/// It finishes what it serves, and its successor is there meanwhile.
#[test]
fn a_worker_of_the_process_before_gets_nothing_new_and_leaves_nothing_behind() {
    let Some((group, keeper)) = kept() else { return };
    let address = group.address();
    let old = group.listener(1).unwrap().try_clone_to_owned().unwrap();
    let _clients = connect(address, 4);
    drop(group);
    assert_eq!(queue_depth(old.as_fd()).unwrap() + queue_depth(keeper.as_fd()).unwrap(), 4);
    let waits = queue_depth(old.as_fd()).unwrap();
    assert!(waits >= 2, "its own at least");
    let mut next = over(keeper, &[1]);
    let _early = connect(address, 3);
    next.set_live(&[1]).unwrap();
    let _late = connect(address, 6);
    assert_eq!(queue_depth(old.as_fd()).unwrap(), waits, "nothing new");
    drop(old);
    next.empty_keeper().unwrap();
    assert_eq!(depths(&next), [13]);
}

#[test]
fn a_process_that_was_killed_while_it_stopped_is_followed_as_well() {
    let Some((mut group, keeper)) = kept() else { return };
    group.set_live(&[]).unwrap();
    let address = group.address();
    let mut clients = connect(address, 5);
    // The keeper is in the map of the one before, which lives on for a moment.
    drop(group);
    let mut next = over(keeper, &[1]);
    clients.extend(connect(address, 5));
    next.set_live(&[1]).unwrap();
    next.empty_keeper().unwrap();
    let waiting: u32 = depths(&next).iter().sum();
    assert_eq!(waiting, 10);
}

#[test]
fn a_socket_that_was_alone_becomes_a_keeper_and_is_alone_again() {
    let Some(_) = kept() else { return };
    let alone = bind_listener(loopback(), &Options::default()).unwrap();
    let copy = alone.try_clone().unwrap();
    let address = polyfork_sys::reuseport::local_addr(alone.as_fd()).unwrap();
    let _clients = connect(address, 6);
    let mut group = over(alone, &[1, 2]);
    group.set_live(&[1, 2]).unwrap();
    group.empty_keeper().unwrap();
    let _more = connect(address, 4);
    assert_eq!(depths(&group).iter().sum::<u32>(), 10);
    group.leave_keeper();
    drop(group);
    reuse_alone(copy.as_fd(), 511).unwrap();
    assert_eq!(queue_depth(copy.as_fd()).unwrap(), 10);
    let rival = Group::bind(address, &Options::default(), &[1], Want::Auto);
    assert!(rival.unwrap_err().is_in_use(), "nobody else gets in");
}

#[test]
fn a_rival_is_kept_out_by_the_keeper_alone() {
    let Some((group, keeper)) = kept() else { return };
    let address = group.address();
    drop(group);
    let rival = Group::bind(address, &Options::default(), &[1], Want::Auto);
    assert!(rival.unwrap_err().is_in_use());
    assert!(bind_listener(address, &Options::default()).unwrap_err().is_in_use());
    drop(keeper);
    assert!(bind_listener(address, &Options::default()).is_ok());
}

#[test]
fn a_keeper_that_is_let_go_stops_listening_for_everybody() {
    let Some((mut group, keeper)) = kept() else { return };
    let address = group.address();
    group.set_live(&[]).unwrap();
    let _clients = connect(address, 5);
    group.set_live(&[1]).unwrap();
    group.remove_keeper().unwrap();
    assert_eq!(depths(&group), [5, 0]);
    drop(group);
    assert!(TcpStream::connect(address).is_err(), "although the copy is open");
    drop(keeper);
}

#[test]
fn a_copy_of_a_file_is_no_keeper() {
    let file = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    let (error, file) = *Group::over(file, &Options::default(), &[1]).unwrap_err();
    assert!(error.to_string().contains("a kept socket"), "{error}");
    drop(file);
}
