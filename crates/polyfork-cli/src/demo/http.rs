//! As much HTTP/1.1 as the demo needs: GET and HEAD, kept-alive connections, no bodies.
//!
//! Written out because the demo lives in the command, whose every page of code counts in the memory of each primary; a
//! web framework would be a quarter of it. Servers built on the crate use axum, hyper or tonic as they are.
//!
//! The surprising rule: whatever is odd about a request ends the connection after the answer, so nothing that follows
//! can be taken for a request (no request smuggling by what is not understood).
//!
//! Source: RFC 9112, sections 2 to 6 and 9.3.

use std::fmt::Write;

/// Longest request line and fields together.
pub(super) const HEAD_BYTES: usize = 8 << 10;

/// A request, as far as it matters.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request<'a> {
    /// Path with its query.
    pub(super) target: &'a str,
    /// HEAD: the answer comes without its body.
    pub(super) head: bool,
    /// Whether the connection stays open after the answer.
    pub(super) keep_alive: bool,
}

/// What the bytes so far are.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Read<'a> {
    /// The beginning of a request.
    Part,
    /// A request that is so many bytes long.
    Whole(Request<'a>, usize),
    /// Nothing that will be answered with anything but this status; the connection ends.
    Refused(Status),
}

/// The statuses that are given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Ok = 200,
    BadRequest = 400,
    NotFound = 404,
    MethodNotAllowed = 405,
    ContentTooLarge = 413,
    FieldsTooLarge = 431,
    VersionNotSupported = 505,
}

impl Status {
    fn reason(self) -> &'static str {
        match self {
            Status::Ok => "OK",
            Status::BadRequest => "Bad Request",
            Status::NotFound => "Not Found",
            Status::MethodNotAllowed => "Method Not Allowed",
            Status::ContentTooLarge => "Content Too Large",
            Status::FieldsTooLarge => "Request Header Fields Too Large",
            Status::VersionNotSupported => "HTTP Version Not Supported",
        }
    }
}

/// An answer.
#[derive(Debug)]
pub(super) struct Answer<'a> {
    pub(super) status: Status,
    pub(super) content_type: &'static str,
    /// Further fields, each with its line end.
    pub(super) fields: &'static str,
    pub(super) body: &'a str,
    pub(super) keep_alive: bool,
}

impl Answer<'_> {
    /// Words that explain a status.
    pub(super) fn refusal(status: Status) -> Answer<'static> {
        let fields = if status == Status::MethodNotAllowed { "allow: GET, HEAD\r\n" } else { "" };
        let body = status.reason();
        Answer { status, content_type: "text/plain", fields, body, keep_alive: false }
    }

    /// The answer as it is sent.
    pub(super) fn bytes(&self, head_only: bool) -> Vec<u8> {
        let Answer { status, content_type, fields, body, keep_alive } = self;
        let connection = if *keep_alive { "keep-alive" } else { "close" };
        let mut text = String::with_capacity(body.len() + 256);
        // Writing to a string does not fail.
        let _ = write!(
            text,
            "HTTP/1.1 {} {}\r\ncontent-type: {content_type}\r\ncontent-length: {}\r\n\
             cache-control: no-store\r\nconnection: {connection}\r\n{fields}\r\n",
            *status as u16,
            status.reason(),
            body.len(),
        );
        if !head_only {
            text.push_str(body);
        }
        text.into_bytes()
    }
}

/// Looks at what a client has sent so far.
pub(super) fn read(bytes: &[u8]) -> Read<'_> {
    let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else {
        let full = bytes.len() >= HEAD_BYTES;
        return if full { Read::Refused(Status::FieldsTooLarge) } else { Read::Part };
    };
    match std::str::from_utf8(&bytes[..end]).map_err(|_| Status::BadRequest).and_then(parse) {
        Ok(request) => Read::Whole(request, end + 4),
        Err(status) => Read::Refused(status),
    }
}

fn parse(head: &str) -> Result<Request<'_>, Status> {
    let mut lines = head.split("\r\n");
    let mut words = lines.next().unwrap_or_default().split(' ');
    let (Some(method), Some(target), Some(version), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(Status::BadRequest);
    };
    if !target.starts_with('/') || head.bytes().any(|byte| byte == 0) {
        return Err(Status::BadRequest);
    }
    let mut keep_alive = match version {
        "HTTP/1.1" => true,
        "HTTP/1.0" => false,
        _ => return Err(Status::VersionNotSupported),
    };
    for line in lines {
        let (name, value) = line.split_once(':').ok_or(Status::BadRequest)?;
        if name.eq_ignore_ascii_case("connection") {
            keep_alive = stays_open(value, keep_alive);
        }
        let none = value.trim() == "0";
        if name.eq_ignore_ascii_case("transfer-encoding")
            || (name.eq_ignore_ascii_case("content-length") && !none)
        {
            return Err(Status::ContentTooLarge);
        }
    }
    match method {
        "GET" | "HEAD" => Ok(Request { target, head: method == "HEAD", keep_alive }),
        _ => Err(Status::MethodNotAllowed),
    }
}

/// What the field `connection` makes of the default.
fn stays_open(value: &str, default: bool) -> bool {
    let has = |option: &str| value.split(',').any(|word| word.trim().eq_ignore_ascii_case(option));
    if has("close") { false } else { default || has("keep-alive") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(text: &str) -> Request<'_> {
        match read(text.as_bytes()) {
            Read::Whole(request, _) => request,
            other => panic!("{text:?}: {other:?}"),
        }
    }

    #[test]
    fn a_request_is_read_whole_or_waited_for() {
        let text = "GET /json?close HTTP/1.1\r\nHost: x\r\n\r\n";
        for cut in 0..text.len() {
            assert_eq!(read(&text.as_bytes()[..cut]), Read::Part);
        }
        let two = text.repeat(2);
        let Read::Whole(request, length) = read(two.as_bytes()) else { panic!("whole") };
        assert_eq!(request, Request { target: "/json?close", head: false, keep_alive: true });
        assert_eq!(length, text.len(), "what follows is the next request");
    }

    #[test]
    fn a_connection_stays_open_as_version_and_client_say() {
        for (version, field, stays) in [
            ("1.1", "", true),
            ("1.1", "Connection: close\r\n", false),
            ("1.1", "connection: foo, Close\r\n", false),
            ("1.0", "", false),
            ("1.0", "Connection: Keep-Alive\r\n", true),
        ] {
            let text = format!("HEAD / HTTP/{version}\r\n{field}\r\n");
            let request = whole(&text);
            assert!(request.head && request.keep_alive == stays, "{text:?}");
        }
    }

    #[test]
    fn what_is_odd_is_refused() {
        for (text, status) in [
            ("POST / HTTP/1.1\r\n\r\n", Status::MethodNotAllowed),
            ("GET / HTTP/1.1\r\nContent-Length: 5\r\n\r\n", Status::ContentTooLarge),
            ("GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", Status::ContentTooLarge),
            ("GET / HTTP/2.0\r\n\r\n", Status::VersionNotSupported),
            ("GET http://x/ HTTP/1.1\r\n\r\n", Status::BadRequest),
            ("GET  / HTTP/1.1\r\n\r\n", Status::BadRequest),
            ("GET / HTTP/1.1\r\nno colon\r\n\r\n", Status::BadRequest),
            ("GET /\0 HTTP/1.1\r\n\r\n", Status::BadRequest),
            ("\r\n\r\n", Status::BadRequest),
        ] {
            assert_eq!(read(text.as_bytes()), Read::Refused(status), "{text:?}");
        }
        assert_eq!(read(b"GET /\xff HTTP/1.1\r\n\r\n"), Read::Refused(Status::BadRequest));
        assert_eq!(read(&[b'x'; HEAD_BYTES]), Read::Refused(Status::FieldsTooLarge));
    }

    #[test]
    fn an_answer_tells_its_length_and_what_becomes_of_the_connection() {
        let answer = Answer {
            status: Status::Ok,
            content_type: "text/plain",
            fields: "",
            body: "ok\n",
            keep_alive: true,
        };
        let text = String::from_utf8(answer.bytes(false)).unwrap();
        assert!(
            text.starts_with("HTTP/1.1 200 OK\r\n") && text.ends_with("\r\n\r\nok\n"),
            "{text}"
        );
        assert!(text.contains("content-length: 3\r\n") && text.contains("connection: keep-alive"));
        let head = String::from_utf8(answer.bytes(true)).unwrap();
        assert!(head.contains("content-length: 3\r\n") && head.ends_with("\r\n\r\n"));
        let refusal = Answer::refusal(Status::MethodNotAllowed).bytes(false);
        assert!(String::from_utf8(refusal).unwrap().contains("allow: GET, HEAD\r\n"));
    }
}
