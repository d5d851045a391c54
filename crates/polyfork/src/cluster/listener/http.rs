//! Serves an axum application so that no client loses a request when the worker leaves.
//!
//! Accepts, hands connections to hyper, and ends them; what is answered is the application's business.
//!
//! The rule that surprises: a worker that is to stop does not close connections that wait for their next request. A request may be
//! on its way to each of them, and closing would lose it (RFC 9112, 9.5 and 9.6). It answers one more, with `Connection: close`, and closes
//! only those from which nothing has come for a while.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::ConnectInfo;
use axum::http::{HeaderValue, header};
use hyper::Request;
use hyper::body::Incoming;
use hyper::service::Service;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::task::TaskTracker;

use crate::cluster::Worker;

/// How long a client may take to send one more request before its connection is closed.
const LAST_REQUEST_LIMIT: Duration = Duration::from_secs(1);

/// Serves `app` until the worker is asked to stop, and then until every client has had its answer.
///
/// As `axum::serve(..).with_graceful_shutdown(worker.shutdown())`, but for kept-alive connections: those are not closed between two
/// requests, where a request may be on its way. The next one is answered with `Connection: close`; a connection from which none comes for a
/// second is closed. The worker's grace period bounds all of it. `ConnectInfo` has the listener's own kind of address.
///
/// HTTP/1 only, with upgrades. Takes whatever `axum::serve` takes, what
/// [`tap_io`](axum::serve::ListenerExt::tap_io) returns included.
///
/// ```no_run
/// # #[cfg(feature = "axum")]
/// # mod example {
/// use axum::{Router, routing::get};
/// use polyfork::cluster::{self, MainResult, Worker};
///
/// async fn main(worker: Worker) -> MainResult {
///     let listener = worker.listen("127.0.0.1:3000").await?;
///     let app = Router::new().route("/", get(|| async { "hello" }));
///     cluster::serve(listener, app, &worker).await;
///     Ok(())
/// }
/// # }
/// ```
///
/// # Cancellation
/// Dropped, it accepts nothing more; connections that are served go on.
pub async fn serve<L>(mut listener: L, app: Router, worker: &Worker)
where
    L: axum::serve::Listener,
    L::Addr: Clone + Sync,
{
    let connections = TaskTracker::new();
    let mut stop = pin!(worker.shutdown());
    loop {
        let (io, address) = tokio::select! {
            biased;
            () = &mut stop => break,
            accepted = listener.accept() => accepted,
        };
        connections.spawn(connection(io, address, app.clone(), worker.clone()));
    }
    drop(listener);
    connections.close();
    connections.wait().await;
}

async fn connection<I, A>(io: I, address: A, app: Router, worker: Worker)
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    A: Clone + Send + Sync + 'static,
{
    let asked = Arc::new(Asked::default());
    let answers = Answers {
        app: TowerToHyperService::new(app),
        address,
        worker: worker.clone(),
        asked: Arc::clone(&asked),
    };
    let served = hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(io), answers)
        .with_upgrades();
    let mut served = pin!(served);
    tokio::select! {
        // A client that went away, or sent no HTTP, is nobody's error.
        _ended = &mut served => return,
        () = worker.shutdown() => {}
    }
    loop {
        let before = asked.so_far();
        tokio::select! {
            _ended = &mut served => return,
            () = tokio::time::sleep(LAST_REQUEST_LIMIT) => {}
        }
        if before == asked.so_far() && !asked.is_answering() {
            break;
        }
    }
    served.as_mut().graceful_shutdown();
    let _ended = served.await;
}

/// What was asked on a connection, and answered.
#[derive(Debug, Default)]
struct Asked {
    begun: AtomicU64,
    done: AtomicU64,
}

impl Asked {
    fn so_far(&self) -> u64 {
        self.begun.load(Ordering::Relaxed)
    }

    fn is_answering(&self) -> bool {
        self.so_far() != self.done.load(Ordering::Relaxed)
    }
}

/// Counts an answer as done, also when its client goes away before.
struct Answering(Arc<Asked>);

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.done.fetch_add(1, Ordering::Relaxed);
    }
}

/// The application, as hyper asks it.
struct Answers<A> {
    app: TowerToHyperService<Router>,
    address: A,
    worker: Worker,
    asked: Arc<Asked>,
}

impl<A: Clone + Send + Sync + 'static> Service<Request<Incoming>> for Answers<A> {
    type Response = axum::response::Response;
    type Error = std::convert::Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        self.asked.begun.fetch_add(1, Ordering::Relaxed);
        let answering = Answering(Arc::clone(&self.asked));
        request.extensions_mut().insert(ConnectInfo(self.address.clone()));
        let answer = self.app.call(request);
        let worker = self.worker.clone();
        Box::pin(async move {
            let mut response = answer.await?;
            if worker.is_stopping() {
                let close = HeaderValue::from_static("close");
                response.headers_mut().insert(header::CONNECTION, close);
            }
            drop(answering);
            Ok(response)
        })
    }
}
