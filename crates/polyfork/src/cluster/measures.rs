//! What the programs of workers measure of themselves: asked for here, made sense of by who asked.
//!
//! Node programs that prepare for prom-client's cluster aggregation (`new AggregatorRegistry()`) are asked with its own
//! message and answer as if a Node primary had asked. Programs built on this crate are asked by a frame of the native
//! dialect, once they have said that they can answer ([`Worker::on_metrics`](super::Worker::on_metrics)).
//!
//! The rule that surprises: nobody knows whether a Node program will answer. So each is asked, but who has left a few
//! questions unanswered is not waited for any more; if it answers after all it counts again. An answer to one of
//! our questions is never told as a message, however late it comes.
//!
//! Bounded: a few questions at a time, an answer of 4 MiB, and no question to a worker that has not read the one before.
//!
//! Behaviour follows: prom-client 15 `lib/cluster.js`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use polyfork_core::WorkerId;
use polyfork_wire::native::ToWorker;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

use super::Cluster;
use super::event::{Encoded, Message, Who};
use super::link::Link;
use super::outgoing::{Outgoing, Spoken};
use super::primary::{Command, Primary};

/// The type of prom-client's answers.
const ANSWER: &str = "prom-client:getMetricsRes";
/// The type of its questions.
const QUESTION: &str = "prom-client:getMetricsReq";
/// Our questions, so that answers to those of the program's own primary are told as ever.
const OURS: &str = "polyfork:";
/// Questions that wait for answers at a time; the oldest gives way.
const MOST_QUESTIONS: usize = 8;
/// Who has not answered so many questions is not waited for.
const PATIENCE: u8 = 3;
/// The longest answer.
const LONGEST: usize = 4 << 20;
/// The type stands at the beginning of an answer, as JavaScript keeps the order of properties.
const HEAD: usize = 64;

/// What a worker's program says that it measures.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Measured {
    /// prom-client's message: an object with `metrics`, or with `error`.
    PromClient(Message),
    /// Text in the exposition format of Prometheus.
    Text(String),
    /// It could not tell, and why.
    Failed(String),
    /// It did not answer in time, or ended, and has answered before.
    Late,
    /// It has never answered: its program does not measure, as a rule.
    Silent,
}

/// One worker's measures.
#[derive(Debug, Clone)]
pub struct Measures {
    /// The worker.
    pub who: Who,
    /// What it said.
    pub measured: Measured,
}

/// What a worker is known for.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Habit {
    /// Native: it said that it can answer.
    pub(crate) offers: bool,
    answered: bool,
    in_vain: u8,
}

/// Questions under way.
#[derive(Debug, Default)]
pub(crate) struct Questions {
    last: u64,
    open: BTreeMap<u64, Question>,
    /// Somebody answered some time.
    ever_answered: bool,
    /// Questions so far, up to a few.
    asked: u8,
}

#[derive(Debug)]
struct Question {
    owing: BTreeSet<WorkerId>,
    answers: mpsc::Sender<Measures>,
}

/// What is known of questions, as it is carried to the next image of the primary. Whoever waited for an answer does not wait
/// any more.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct QuestionsState {
    last: u64,
    ever_answered: bool,
    asked: u8,
}

impl Questions {
    pub(crate) fn state(&self) -> QuestionsState {
        let Questions { last, open: _, ever_answered, asked } = self;
        QuestionsState { last: *last, ever_answered: *ever_answered, asked: *asked }
    }
}

impl QuestionsState {
    pub(crate) fn back(self) -> Questions {
        let QuestionsState { last, ever_answered, asked } = self;
        Questions { last, open: BTreeMap::new(), ever_answered, asked }
    }
}

/// Who was asked, and where the answers come.
#[derive(Debug)]
pub(crate) struct Asked {
    /// Everybody, by id, and whether they have answered before.
    everybody: BTreeMap<u64, (Who, bool)>,
    /// Who is worth waiting for.
    awaited: BTreeSet<u64>,
    answers: mpsc::Receiver<Measures>,
}

#[derive(Serialize)]
struct Request<'a> {
    r#type: &'static str,
    #[serde(rename = "requestId")]
    request_id: &'a str,
}

#[derive(Deserialize)]
struct Head {
    r#type: String,
    #[serde(rename = "requestId")]
    request_id: serde_json::Value,
}

/// The number of our question that a message answers.
fn answered(message: &Encoded) -> Option<u64> {
    let number = |id: &str| id.strip_prefix(OURS)?.parse().ok();
    match message {
        Encoded::Json(text) => {
            let head = text.as_bytes().get(..HEAD.min(text.len()))?;
            memchr::memmem::find(head, ANSWER.as_bytes())?;
            let head: Head = serde_json::from_str(text).ok()?;
            (head.r#type == ANSWER).then_some(())?;
            number(head.request_id.as_str()?)
        }
        Encoded::Advanced(value) => {
            (value.get("type")?.as_str()? == ANSWER).then_some(())?;
            number(value.get("requestId")?.as_str()?)
        }
        Encoded::Postcard(_) => None,
    }
}

fn length(message: &Encoded) -> usize {
    match message {
        Encoded::Json(text) => text.len(),
        // Its frame was bounded, and so is what becomes of it.
        Encoded::Advanced(_) => 0,
        Encoded::Postcard(bytes) => bytes.len(),
    }
}

impl Primary {
    /// Asks every worker that can be asked.
    pub(crate) fn ask_measures(&mut self, reply: oneshot::Sender<Asked>) {
        self.questions.last += 1;
        let number = self.questions.last;
        let name = format!("{OURS}{number}");
        let request = Request { r#type: QUESTION, request_id: &name };
        let spoken = Spoken::default();
        let (mut everybody, mut awaited, mut owing) =
            (BTreeMap::new(), BTreeSet::new(), BTreeSet::new());
        for w in self.workers.values() {
            spoken.note(w.running.link.encoding());
        }
        let message = Outgoing::new(&request, None, &spoken);
        let hopeful = self.questions.ever_answered || self.questions.asked < PATIENCE;
        self.questions.asked = self.questions.asked.saturating_add(1);
        let mut touched = Vec::new();
        for (id, w) in &mut self.workers {
            if !w.ready || w.disconnected || !w.running.link.exists() {
                continue;
            }
            let native = matches!(w.running.link, Link::Native(_));
            if native && !w.habit.offers {
                continue;
            }
            everybody.insert(id.0, (w.who, w.habit.answered));
            // One that has not read the last question cannot answer this one.
            if w.running.link.queued_bytes() > 0 {
                continue;
            }
            let asked = match &mut w.running.link {
                Link::Native(link) => {
                    link.push(&ToWorker::Metrics { request: number }, Vec::new());
                    true
                }
                link => link.push_user_message(&message).is_ok(),
            };
            if asked {
                let worth = native || w.habit.answered || (hopeful && w.habit.in_vain < PATIENCE);
                if worth {
                    awaited.insert(id.0);
                }
                w.habit.in_vain = w.habit.in_vain.saturating_add(1);
                owing.insert(*id);
                touched.push(*id);
            }
        }
        for id in touched {
            self.flush(id);
        }
        let (sender, answers) = mpsc::channel(owing.len().max(1));
        self.questions.open.retain(|_, question| !question.answers.is_closed());
        while self.questions.open.len() >= MOST_QUESTIONS {
            self.questions.open.pop_first();
        }
        if !owing.is_empty() {
            self.questions.open.insert(number, Question { owing, answers: sender });
        }
        // The asker may have gone.
        let _ = reply.send(Asked { everybody, awaited, answers });
    }

    /// Takes a message that answers one of our questions; gives back every other.
    pub(crate) fn take_measures(&mut self, worker: WorkerId, message: Encoded) -> Option<Encoded> {
        let Some(number) = answered(&message) else { return Some(message) };
        let measured = match length(&message) {
            long if long > LONGEST => {
                Measured::Failed(format!("an answer of {long} bytes; {LONGEST} are read"))
            }
            _ => Measured::PromClient(Message(message)),
        };
        self.measures_came(worker, number, measured);
        None
    }

    /// A native worker answered.
    pub(crate) fn on_native_metrics(
        &mut self,
        worker: WorkerId,
        number: u64,
        answer: Result<String, String>,
    ) {
        let measured = match answer {
            Ok(text) if text.len() <= LONGEST => Measured::Text(text),
            Ok(text) => {
                Measured::Failed(format!("an answer of {} bytes; {LONGEST} are read", text.len()))
            }
            Err(why) => Measured::Failed(why),
        };
        self.measures_came(worker, number, measured);
    }

    fn measures_came(&mut self, worker: WorkerId, number: u64, measured: Measured) {
        let Some(w) = self.workers.get_mut(&worker) else { return };
        w.habit.answered = true;
        w.habit.in_vain = 0;
        self.questions.ever_answered = true;
        let who = w.who;
        if let Some(question) = self.questions.open.get_mut(&number)
            && question.owing.remove(&worker)
        {
            // There is room for one answer of each; the asker may have gone.
            let _ = question.answers.try_send(Measures { who, measured });
            if question.owing.is_empty() {
                self.questions.open.remove(&number);
            }
        }
    }

    /// Nobody needs to wait for a worker that is gone.
    pub(crate) fn measures_cannot_come(&mut self, worker: WorkerId, who: Who) {
        for question in self.questions.open.values_mut() {
            if question.owing.remove(&worker) {
                // As above.
                let _ = question.answers.try_send(Measures { who, measured: Measured::Late });
            }
        }
    }
}

impl Asked {
    /// Collects answers until all have come that can be hoped for, or the time is over.
    async fn collect(mut self, until: Instant) -> Vec<Measures> {
        let mut all = Vec::with_capacity(self.everybody.len());
        while !self.awaited.is_empty()
            && let Ok(Some(measures)) = timeout_at(until, self.answers.recv()).await
        {
            self.take(&mut all, measures);
        }
        // Who was not waited for may have answered meanwhile.
        while let Ok(measures) = self.answers.try_recv() {
            self.take(&mut all, measures);
        }
        all.extend(self.everybody.into_values().map(|(who, answered)| Measures {
            who,
            measured: if answered { Measured::Late } else { Measured::Silent },
        }));
        all.sort_by_key(|measures| (measures.who.slot, measures.who.worker));
        all
    }

    fn take(&mut self, all: &mut Vec<Measures>, mut measures: Measures) {
        let id = measures.who.worker;
        self.awaited.remove(&id);
        let Some((_, answered)) = self.everybody.remove(&id) else { return };
        if matches!(measures.measured, Measured::Late) && !answered {
            measures.measured = Measured::Silent;
        }
        all.push(measures);
    }
}

impl Cluster {
    /// Asks the programs of all ready workers what they measure of themselves: with prom-client's message in Node workers,
    /// by [`Worker::on_metrics`](super::Worker::on_metrics) in workers built on this crate; others cannot be
    /// asked. Answers after `limit` at the latest, with what has come by then.
    ///
    /// Programs of Node get a message `{type: 'prom-client:getMetricsReq', requestId}` by this, whether they use prom-client
    /// or not. Who has never answered is waited for only a few times.
    pub async fn measures(&self, limit: Duration) -> Vec<Measures> {
        let until = Instant::now() + limit;
        let (reply, asked) = oneshot::channel();
        let ask = async {
            self.command(Command::Measures(reply)).await;
            asked.await.ok()
        };
        match timeout_at(until, ask).await {
            Ok(Some(asked)) => asked.collect(until).await,
            // The cluster has ended, or its loop is busy.
            Ok(None) | Err(_) => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_answers_to_our_own_questions_are_taken() {
        let of = |text: &str| answered(&Encoded::Json(text.into()));
        let answer = |id: &str| {
            format!(r#"{{"type":"prom-client:getMetricsRes","requestId":{id},"metrics":[]}}"#)
        };
        assert_eq!(of(&answer(r#""polyfork:7""#)), Some(7));
        for other in [r#""polyfork:x""#, r#""7""#, "7", "null", r#"{"polyfork":1}"#] {
            assert_eq!(of(&answer(other)), None, "{other}");
        }
        assert_eq!(of(r#""prom-client:getMetricsRes""#), None);
        assert_eq!(of(r#"{"text":"prom-client:getMetricsRes","requestId":"polyfork:1"}"#), None);
        assert_eq!(of(""), None);
    }
}
