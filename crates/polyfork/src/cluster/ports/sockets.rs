//! Sockets as the system tells of them: whose they are, and where they listen.
//!
//! Source: proc(5), `net/ipv4/tcp_ipv4.c` of Linux for the order and form of `/proc/net/tcp`.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use crate::cluster::settings::Address;

/// Number of a network interface, for addresses with a scope.
pub(crate) fn interface_index(name: &str) -> Option<u32> {
    if name.contains('/') || name.starts_with('.') {
        return None;
    }
    std::fs::read_to_string(format!("/sys/class/net/{name}/ifindex")).ok()?.trim().parse().ok()
}

pub(crate) fn local_address(fd: BorrowedFd<'_>) -> io::Result<SocketAddr> {
    let address = rustix::net::getsockname(fd)?;
    SocketAddr::try_from(address).map_err(|_| io::Error::from_raw_os_error(libc::EAFNOSUPPORT))
}

/// Inodes of the sockets that a process (`self`, or a number) holds. Empty when that cannot be read.
pub(crate) fn sockets_of(process: &str) -> BTreeSet<u64> {
    let Ok(entries) = std::fs::read_dir(format!("/proc/{process}/fd")) else {
        return BTreeSet::new();
    };
    let targets = entries.flatten().filter_map(|entry| std::fs::read_link(entry.path()).ok());
    let inode = |target: PathBuf| {
        target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
    };
    targets.filter_map(inode).collect()
}

/// TCP addresses of those of `inodes` that listen, in the network namespace of a process, from `/proc`.
pub(crate) fn listening_sockets(pid: u32, inodes: &BTreeSet<u64>) -> Vec<Address> {
    let mut found = Vec::new();
    for table in ["tcp", "tcp6"] {
        let Ok(file) = std::fs::File::open(format!("/proc/{pid}/net/{table}")) else { continue };
        found.extend(listening_in(io::BufReader::new(file), inodes));
    }
    found
}

/// Those of one table. The kernel prints sockets that listen before all others (`tcp_get_idx` in `net/ipv4/tcp_ipv4.c`); what
/// follows may be a hundred thousand connections, finished ones included, and takes a tenth of a second.
fn listening_in(table: impl io::BufRead, inodes: &BTreeSet<u64>) -> Vec<Address> {
    let listens = |line: &String| line.split_ascii_whitespace().nth(3) == Some("0A");
    let lines = table.lines().map_while(Result::ok).skip(1).take_while(listens);
    lines.filter_map(|line| listening_line(&line, inodes)).collect()
}

/// One line of `/proc/net/tcp` about a socket that listens: its address if its inode is one of `inodes`.
fn listening_line(line: &str, inodes: &BTreeSet<u64>) -> Option<Address> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    if !inodes.contains(&fields.get(9)?.parse().ok()?) {
        return None;
    }
    let (host, port) = fields.get(1)?.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    // The kernel prints each 32-bit word of the address in the machine's byte order.
    let words: Vec<[u8; 4]> = (0..host.len() / 8)
        .map(|i| Some(u32::from_str_radix(host.get(i * 8..i * 8 + 8)?, 16).ok()?.to_ne_bytes()))
        .collect::<Option<_>>()?;
    let ip = match words.as_slice() {
        [v4] => IpAddr::V4(Ipv4Addr::from(*v4)),
        [a, b, c, d] => {
            let mut bytes = [0; 16];
            for (to, from) in bytes.chunks_exact_mut(4).zip([a, b, c, d]) {
                to.copy_from_slice(from);
            }
            IpAddr::from(bytes)
        }
        _ => return None,
    };
    Some(Address::Tcp(SocketAddr::new(ip, port)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_sockets_are_found_with_their_addresses() {
        let v4 = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let v6 = std::net::TcpListener::bind("[::1]:0");
        let found = listening_sockets(std::process::id(), &sockets_of("self"));
        for address in
            [Some(v4), v6.ok()].into_iter().flatten().map(|l| l.local_addr().expect("address"))
        {
            assert!(found.contains(&Address::Tcp(address)), "{address} in {found:?}");
        }
    }

    /// The fault: with a hundred thousand connections, looking for a worker's own socket kept the primary busy all the time.
    #[test]
    fn connections_are_not_read_through_for_sockets_that_listen() {
        struct Never;
        impl io::Read for Never {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                panic!("what follows the first connection was read")
            }
        }
        let table = "  sl  local_address rem_address   st tx_queue\n\
                     0: 0100007F:1F90 00000000:0000 0A 0:0 0:0 0 0 0 7 1\n\
                     1: 0100007F:1F91 0100007F:C001 06 0:0 0:0 0 0 0 0 3\n";
        let reader = io::BufReader::new(io::Read::chain(table.as_bytes(), Never));
        let found = listening_in(reader, &BTreeSet::from([7]));
        assert_eq!(found, [Address::Tcp("127.0.0.1:8080".parse().expect("an address"))]);
    }

    #[test]
    fn a_line_that_makes_no_sense_is_no_socket() {
        let inodes = BTreeSet::from([7]);
        for line in
            ["", "0: x", "0: 0100007F:ZZZZ 0:0 0A 0 0 0 0 0 7", "0: 01:1F90 0:0 0A 0 0 0 0 0 7"]
        {
            assert_eq!(listening_line(line, &inodes), None);
        }
    }
}
