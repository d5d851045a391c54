//! A stock Node receiver behind a unix socket, as a model, and a sender that plays against it.
//!
//! The socket follows `unix_stream_read_generic` of Linux: a write becomes buffers, descriptors sit on the first
//! of them, a read gathers buffers and ends after one that carried descriptors, or inside a buffer when the
//! read is full. The receiver follows `uv__read` and Node's channel: up to 65,536 bytes a read, one descriptor
//! taken per read and kept in one place until the next envelope, overwritten by the next one. It is
//! this carelessness that the outbox must work around.
//!
//! [`play`] drives an [`Outbox`] against it by a list of steps, so that a property test, a fuzzer and a
//! plain example use the same code. It panics when a promise is broken.

use std::collections::VecDeque;

use polyfork_wire::ProtocolError;
use polyfork_wire::node::outbox::Outbox;

/// Most bytes that one read of libuv takes.
const READ_BYTES: usize = 65_536;

/// The smallest buffer that Linux cuts a write into when `SO_SNDBUF` is what the outbox asks for.
const BUFFER_BYTES: usize = 65_664 / 2 - 64;

/// What one write, or a part of it, became in the kernel.
struct Buffer {
    bytes: Vec<u8>,
    read: usize,
    descriptor: Option<u32>,
}

/// A unix stream socket on the way to the receiver.
#[derive(Default)]
pub(crate) struct Socket {
    buffers: VecDeque<Buffer>,
}

impl Socket {
    /// One `sendmsg`.
    pub(crate) fn send(&mut self, bytes: &[u8], descriptor: Option<u32>) {
        let mut descriptor = descriptor;
        for buffer in bytes.chunks(BUFFER_BYTES) {
            let bytes = buffer.to_vec();
            self.buffers.push_back(Buffer { bytes, read: 0, descriptor: descriptor.take() });
        }
    }

    /// One `recvmsg`.
    fn receive(&mut self, size: usize) -> (Vec<u8>, Option<u32>) {
        let mut bytes = Vec::new();
        while let Some(buffer) = self.buffers.front_mut() {
            let rest = &buffer.bytes[buffer.read..];
            let chunk = rest.len().min(size - bytes.len());
            bytes.extend_from_slice(&rest[..chunk]);
            buffer.read += chunk;
            let descriptor = buffer.descriptor.take();
            if buffer.read < buffer.bytes.len() {
                return (bytes, descriptor);
            }
            self.buffers.pop_front();
            if descriptor.is_some() || bytes.len() == size {
                return (bytes, descriptor);
            }
        }
        (bytes, None)
    }

    /// Everything that was not read, for somebody who pulls it out; descriptors are dropped.
    fn take_unread(&mut self) -> Vec<u8> {
        let buffers = std::mem::take(&mut self.buffers);
        buffers.iter().flat_map(|buffer| &buffer.bytes[buffer.read..]).copied().collect()
    }

    fn is_empty(&self) -> bool {
        self.buffers.is_empty()
    }
}

/// What the receiver made of a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Got {
    /// A plain line, by its number.
    Plain(u32),
    /// A line that overtakes, by its number.
    Bypass(u32),
    /// An envelope, by its number, and the descriptor it was given.
    Handle(u32, Option<u32>),
}

/// A stock Node process that reads a channel.
#[derive(Default)]
pub(crate) struct Receiver {
    partial: Vec<u8>,
    slot: Option<u32>,
    /// Everything received, in order.
    pub(crate) got: Vec<Got>,
    /// Acknowledgements on their way back; true for a NACK.
    pub(crate) acks: VecDeque<bool>,
}

impl Receiver {
    /// One read from the socket. False if there was nothing to read.
    pub(crate) fn read(&mut self, socket: &mut Socket) -> bool {
        let (bytes, descriptor) = socket.receive(READ_BYTES);
        if bytes.is_empty() {
            return false;
        }
        if descriptor.is_some() {
            self.slot = descriptor;
        }
        let mut rest = &bytes[..];
        while let Some(newline) = memchr::memchr(b'\n', rest) {
            let (piece, after) = rest.split_at(newline + 1);
            self.partial.extend_from_slice(piece);
            let line = std::mem::take(&mut self.partial);
            self.line(&line);
            rest = after;
        }
        self.partial.extend_from_slice(rest);
        true
    }

    fn line(&mut self, received: &[u8]) {
        let kind = char::from(received[0]);
        let digits = received[1..].iter().take_while(|byte| byte.is_ascii_digit());
        let number = digits.fold(0, |number, digit| 10 * number + u32::from(digit - b'0'));
        assert!(received == line(kind, number, received.len()), "a line is damaged");
        self.got.push(match kind {
            'P' => Got::Plain(number),
            'B' => Got::Bypass(number),
            'H' => {
                let descriptor = self.slot.take();
                self.acks.push_back(descriptor.is_none());
                Got::Handle(number, descriptor)
            }
            _ => panic!("a line is damaged"),
        });
    }
}

/// A line of `length` bytes, or a little more, that says what it is.
pub(crate) fn line(kind: char, number: u32, length: usize) -> Vec<u8> {
    let name = format!("{kind}{number}");
    let dots = length.saturating_sub(name.len() + 1);
    [name.as_bytes(), &vec![b'.'; dots], b"\n"].concat()
}

/// One thing that happens between the two processes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Step {
    /// A plain line of this length is pushed.
    Plain(usize),
    /// A handle line of this length is pushed.
    Handle(usize),
    /// An overtaking line is pushed.
    Bypass,
    /// The chunk is written whole.
    Write,
    /// At most so many bytes of the chunk are written.
    WriteSome(usize),
    /// The receiver reads once.
    Read,
    /// One acknowledgement reaches the sender.
    Acknowledge,
    /// The receiver is stuck: its unread bytes are pulled back.
    Rewind,
}

/// Plays the steps, then lets everything arrive, and checks the promises of the outbox.
pub(crate) fn play(window: usize, steps: &[Step]) {
    let mut game = Game::new(window);
    for step in steps {
        game.step(*step);
        game.check_counters();
    }
    game.finish();
}

/// The two processes, and what the sender should have in mind.
struct Game {
    outbox: Outbox<u32>,
    socket: Socket,
    receiver: Receiver,
    window: usize,
    pushed: [Vec<u32>; 3],
    pushed_bytes: u64,
    next: u32,
    /// Handles that came back acknowledged, and those that were pulled back unread.
    acknowledged: Vec<u32>,
    returned: Vec<u32>,
    returned_bytes: u64,
    lengths: Vec<usize>,
}

const PLAIN: usize = 0;
const BYPASS: usize = 1;
const HANDLE: usize = 2;

impl Game {
    fn new(window: usize) -> Self {
        Self {
            outbox: Outbox::new(window),
            socket: Socket::default(),
            receiver: Receiver::default(),
            window: window.max(1),
            pushed: Default::default(),
            pushed_bytes: 0,
            next: 0,
            acknowledged: Vec::new(),
            returned: Vec::new(),
            returned_bytes: 0,
            lengths: Vec::new(),
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Plain(length) => {
                let line = self.line('P', PLAIN, length);
                self.outbox.push(line);
            }
            Step::Handle(length) => {
                let line = self.line('H', HANDLE, length);
                self.outbox.push_handle(line, self.next - 1);
            }
            Step::Bypass => {
                let line = self.line('B', BYPASS, 0);
                self.outbox.push_bypass(line);
            }
            Step::Write => self.write(usize::MAX),
            Step::WriteSome(most) => self.write(most),
            Step::Read => {
                self.receiver.read(&mut self.socket);
            }
            Step::Acknowledge => self.acknowledge(),
            Step::Rewind => self.rewind(),
        }
    }

    fn line(&mut self, kind: char, list: usize, length: usize) -> Vec<u8> {
        let line = line(kind, self.next, length);
        self.pushed[list].push(self.next);
        self.pushed_bytes += line.len() as u64;
        self.lengths.push(line.len());
        self.next += 1;
        line
    }

    fn write(&mut self, most: usize) {
        let Some(chunk) = self.outbox.peek() else { return };
        assert!(!chunk.bytes.is_empty());
        let n = chunk.bytes.len().min(most);
        if n > 0 {
            self.socket.send(&chunk.bytes[..n], chunk.handle.copied());
        }
        self.outbox.wrote(n);
    }

    fn acknowledge(&mut self) {
        if let Some(nack) = self.receiver.acks.pop_front() {
            assert!(!nack, "a handle message came without its descriptor");
            let handle = self.outbox.acknowledged(nack).expect("it was in flight");
            self.acknowledged.push(handle);
        }
    }

    fn rewind(&mut self) {
        let unread = self.socket.take_unread();
        let before = self.outbox.written_total();
        let handles = self.outbox.rewind_unread(&unread).expect("these bytes were unread");
        assert_eq!(self.outbox.written_total(), before - unread.len() as u64);
        self.returned_bytes +=
            handles.iter().map(|n| self.lengths[*n as usize] as u64).sum::<u64>();
        self.returned.extend(handles);
    }

    fn check_counters(&self) {
        assert!(self.outbox.in_flight() <= self.window);
        let queued = self.outbox.queued_bytes() as u64;
        assert_eq!(self.outbox.written_total() + queued, self.pushed_bytes - self.returned_bytes);
        let known = self.acknowledged.len() + self.returned.len() + self.outbox.in_flight();
        assert_eq!(self.outbox.queued_handles() + known, self.pushed[HANDLE].len());
    }

    fn finish(&mut self) {
        loop {
            let mut moved = self.outbox.peek().is_some();
            self.write(usize::MAX);
            moved |= self.receiver.read(&mut self.socket);
            moved |= !self.receiver.acks.is_empty();
            self.acknowledge();
            self.check_counters();
            if !moved {
                break;
            }
        }
        assert!(self.outbox.is_empty() && self.socket.is_empty(), "everything arrives in the end");
        assert_eq!(self.outbox.acknowledged(false), Err(ProtocolError::UnsolicitedAck));
        self.check_what_arrived();
    }

    /// Every line once and in order, every handle in its own message or given back.
    fn check_what_arrived(&self) {
        let numbers = |pick: fn(&Got) -> Option<u32>| -> Vec<u32> {
            self.receiver.got.iter().filter_map(pick).collect()
        };
        let plain = numbers(|got| if let Got::Plain(n) = got { Some(*n) } else { None });
        assert_eq!(plain, self.pushed[PLAIN]);
        let bypass = numbers(|got| if let Got::Bypass(n) = got { Some(*n) } else { None });
        assert_eq!(bypass, self.pushed[BYPASS]);
        for got in &self.receiver.got {
            if let Got::Handle(message, descriptor) = got {
                assert_eq!(
                    *descriptor,
                    Some(*message),
                    "the descriptor belongs to another message"
                );
            }
        }
        let handles = numbers(|got| if let Got::Handle(n, _) = got { Some(*n) } else { None });
        assert_eq!(handles, self.acknowledged);
        assert!(self.returned.is_sorted(), "handles come back in order");
        let mut all = [&self.acknowledged[..], &self.returned].concat();
        all.sort_unstable();
        assert_eq!(all, self.pushed[HANDLE]);
        let in_order = numbers(|got| match got {
            Got::Plain(n) | Got::Handle(n, _) => Some(*n),
            Got::Bypass(_) => None,
        });
        assert!(in_order.is_sorted(), "only acknowledgements overtake");
    }
}
