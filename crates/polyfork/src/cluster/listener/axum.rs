//! Lets `axum::serve` take a worker's listeners as they are.
//!
//! Nothing but the traits of `axum::serve`.
//!
//! The rule that surprises: `ConnectInfo<SocketAddr>` needs [`tap_io`](axum::serve::ListenerExt::tap_io).
//! axum implements `Connected` for its own listeners and for what `tap_io` returns; nobody else may
//! implement it for a foreign address type. `listener.tap_io(|tcp| { let _ = tcp.set_nodelay(true); })` is
//! usually wanted anyway. [`RemoteAddr`] works without.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use axum::extract::connect_info::Connected;
use axum::serve::IncomingStream;
use tokio::net::{TcpStream, UnixStream};

use super::{Listener, UnixListener};

/// Pause after an error that will not pass, so that a server that cannot give up does not spin.
const ERROR_PAUSE: Duration = Duration::from_secs(1);

/// The address of a client, for `Router::into_make_service_with_connect_info` and `ConnectInfo`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RemoteAddr(pub SocketAddr);

impl Connected<IncomingStream<'_, Listener>> for RemoteAddr {
    fn connect_info(stream: IncomingStream<'_, Listener>) -> Self {
        RemoteAddr(*stream.remote_addr())
    }
}

impl axum::serve::Listener for Listener {
    type Io = TcpStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (TcpStream, SocketAddr) {
        loop {
            match Listener::accept(self).await {
                Ok(accepted) => return accepted,
                Err(_final) => tokio::time::sleep(ERROR_PAUSE).await,
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Listener::local_addr(self)
    }
}

impl axum::serve::Listener for UnixListener {
    type Io = UnixStream;
    type Addr = tokio::net::unix::SocketAddr;

    async fn accept(&mut self) -> (UnixStream, tokio::net::unix::SocketAddr) {
        loop {
            match UnixListener::accept(self).await {
                Ok(accepted) => return accepted,
                Err(_final) => tokio::time::sleep(ERROR_PAUSE).await,
            }
        }
    }

    fn local_addr(&self) -> io::Result<tokio::net::unix::SocketAddr> {
        use std::os::unix::ffi::OsStrExt;
        let address = match self.path().as_os_str().as_bytes() {
            [0, name @ ..] => {
                use std::os::linux::net::SocketAddrExt;
                std::os::unix::net::SocketAddr::from_abstract_name(name)?
            }
            _ => std::os::unix::net::SocketAddr::from_pathname(self.path())?,
        };
        Ok(address.into())
    }
}
