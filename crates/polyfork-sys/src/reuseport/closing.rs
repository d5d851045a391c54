//! Lets a listening socket finish what waits on it while nothing new comes.
//!
//! A socket that is closed resets the connections in its queue; one that stays open takes new ones that
//! nobody will accept. Between the two there is this filter: it drops each SYN, so that a client tries again
//! a second later and then meets a closed port or the next server, while handshakes that are under way end
//! and the queue can be emptied.
//!
//! Behaviour follows: socket(7) `SO_ATTACH_FILTER`; kernel `tcp_v4_rcv` (the filter of a listener sees
//! the packet from its TCP header on); RFC 9293, section 3.1.

use std::io;
use std::os::fd::BorrowedFd;

const LOAD_BYTE: u16 = 0x30; // BPF_LD | BPF_B | BPF_ABS
const AND: u16 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K
/// Where the flags stand in a TCP header.
const FLAGS: u32 = 13;
const SYN: u32 = 0x02;
const ACK: u32 = 0x10;
const DROP: u32 = 0;
const TAKE: u32 = u32::MAX;

/// From now on this listening TCP socket takes no new handshake. What waits on it can be accepted as before.
///
/// Cannot be undone for connections: those accepted later carry the filter, which does them no harm.
///
/// # Errors
///
/// Those of setsockopt(2): not a socket.
pub fn refuse_new(listener: BorrowedFd<'_>) -> io::Result<()> {
    let plain = |code, k| libc::sock_filter { code, jt: 0, jf: 0, k };
    let mut program = [
        plain(LOAD_BYTE, FLAGS),
        plain(AND, SYN | ACK),
        libc::sock_filter { code: JUMP_EQUAL, jt: 0, jf: 1, k: SYN },
        plain(RETURN, DROP),
        plain(RETURN, TAKE),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    super::set_option(listener, libc::SO_ATTACH_FILTER, &filter)
}
