//! The pool's meeting point, played by a single thread: what holds after any sequence of calls.
//!
//! Interleavings are the business of `loom_pool.rs` and `shuttle_pool.rs`.
#![cfg(not(any(polyfork_loom, polyfork_shuttle)))]
#![allow(clippy::unwrap_used, reason = "a panic is the report")]

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use polyfork_core::sync::pool::{
    Answer, Brought, Call, Coming, Dispatch, Mark, Marked, Next, Priority, Retire, Sizes, Tired,
    WhenFull,
};
use proptest::prelude::*;

#[derive(Clone, Debug)]
struct Task {
    mark: Arc<Mark>,
    number: usize,
    priority: Priority,
}

impl Marked for Task {
    fn mark(&self) -> &Mark {
        &self.mark
    }
}

/// Where a task is, as seen from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Waiting,
    Ended,
}

/// What a thread does at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    Coming(Coming),
    Sleeping,
    Gone,
}

/// The pool, its threads as places in a play, and what has to be true of it.
struct Play {
    dispatch: Dispatch<Task, u64>,
    sizes: Sizes,
    threads: Vec<Doing>,
    tasks: Vec<(Task, Fate)>,
    /// Order of arrival of what waits, by priority.
    order: HashMap<Priority, VecDeque<usize>>,
    shut: bool,
}

impl Play {
    fn new(sizes: Sizes) -> Self {
        let dispatch = Dispatch::new(sizes);
        let order = Priority::ALL.map(|priority| (priority, VecDeque::new())).into();
        Self { dispatch, sizes, threads: Vec::new(), tasks: Vec::new(), order, shut: false }
    }

    fn call(&mut self, call: Call<u64>) {
        match call {
            Call::Nobody => {}
            Call::Wake(id) => {
                let doing = &mut self.threads[id as usize];
                assert_eq!(*doing, Doing::Sleeping, "only sleepers are woken");
                *doing = Doing::Coming(Coming::Called);
            }
            Call::Start => self.threads.push(Doing::Coming(Coming::Called)),
        }
    }

    fn end(&mut self, number: usize) {
        let (task, fate) = &mut self.tasks[number];
        assert_eq!(*fate, Fate::Waiting, "task {number} ends once");
        *fate = Fate::Ended;
        self.order.get_mut(&task.priority).unwrap().retain(|n| *n != number);
    }

    fn bring(&mut self, priority: Priority, full: WhenFull) {
        let number = self.tasks.len();
        let task = Task { mark: Arc::new(Mark::new()), number, priority };
        self.tasks.push((task.clone(), Fate::Waiting));
        self.order.get_mut(&priority).unwrap().push_back(number);
        let waiting = self.dispatch.view().waiting;
        match self.dispatch.bring(task, priority, full) {
            Brought::Accepted { call, displaced, .. } => {
                self.call(call);
                assert_eq!(displaced.is_some(), waiting == self.sizes.capacity);
                if let Some(displaced) = displaced {
                    assert!(displaced.priority >= priority, "none that is more urgent");
                    self.end(displaced.number);
                }
            }
            Brought::InLine => assert_eq!(waiting, self.sizes.capacity),
            Brought::Full(task) => {
                assert_eq!(waiting, self.sizes.capacity);
                self.end(task.number);
            }
            Brought::Closed(task) => {
                assert!(self.shut);
                self.end(task.number);
            }
        }
    }

    fn step(&mut self, id: usize) {
        let Some(Doing::Coming(coming)) = self.threads.get(id).copied() else { return };
        let Answer { next, call, .. } = self.dispatch.next(coming, id as u64, || id as u64);
        self.threads[id] = match next {
            Next::Task(task) => {
                if self.dispatch.view().in_line == 0 {
                    let first = self.order[&task.priority].front();
                    assert_eq!(first, Some(&task.number), "first come, first served");
                }
                self.end(task.number);
                Doing::Coming(Coming::Busy)
            }
            Next::Search => Doing::Coming(Coming::Searching),
            Next::Sleep { .. } => Doing::Sleeping,
            Next::Leave { .. } => Doing::Gone,
        };
        self.call(call);
    }

    fn tired(&mut self, id: usize) {
        if self.threads.get(id) == Some(&Doing::Sleeping) {
            match self.dispatch.tired(id as u64) {
                Tired::Leave { .. } => self.threads[id] = Doing::Gone,
                Tired::Stay => assert!(self.alive() <= self.sizes.min),
                Tired::Called => panic!("nobody called it"),
            }
        }
    }

    fn retire(&mut self, id: usize) {
        if self.threads.get(id) == Some(&Doing::Coming(Coming::Busy)) {
            self.threads[id] = Doing::Gone;
            if self.dispatch.retire() == Retire::Replace {
                self.threads.push(Doing::Coming(Coming::Called));
            }
        }
    }

    fn withdraw(&mut self, number: usize) {
        let Some((task, fate)) = self.tasks.get(number).cloned() else { return };
        let withdrawn = self.dispatch.withdraw(&task.mark);
        assert_eq!(withdrawn.was_waiting, fate == Fate::Waiting);
        if withdrawn.was_waiting {
            self.end(number);
        }
    }

    fn shut(&mut self, abandon: bool) {
        self.shut = true;
        let shut = self.dispatch.shut(abandon);
        for id in shut.wake {
            self.threads[id as usize] = Doing::Coming(Coming::Called);
        }
        for task in shut.tasks {
            // Withdrawn ones that were still in place come along.
            if self.tasks[task.number].1 == Fate::Waiting {
                self.end(task.number);
            }
        }
    }

    fn alive(&self) -> usize {
        self.threads.iter().filter(|doing| **doing != Doing::Gone).count()
    }

    fn check(&self) {
        let view = self.dispatch.view();
        let sleeping = self.threads.iter().filter(|doing| **doing == Doing::Sleeping).count();
        assert_eq!((view.threads, view.sleeping), (self.alive(), sleeping));
        assert!(view.threads <= self.sizes.max && view.waiting <= self.sizes.capacity);
        assert!(view.in_line == 0 || view.waiting == self.sizes.capacity);
        let waiting = self.tasks.iter().filter(|(_, fate)| *fate == Fate::Waiting).count();
        assert_eq!(view.waiting + view.in_line, waiting);
        assert_eq!(self.dispatch.looks_empty(), view.waiting == 0);
        // The promise about wake-ups: work waits beside sleepers only if somebody is on the way to it.
        assert!(view.waiting == 0 || view.sleeping == 0 || view.searching > 0);
    }
}

#[derive(Clone, Debug)]
enum Move {
    /// `true`: to be given back when full, whatever the pool's policy.
    Bring(Priority, bool),
    Step(usize),
    Tired(usize),
    Retire(usize),
    Withdraw(usize),
    Shut(bool),
}

fn moves() -> impl Strategy<Value = Move> {
    let priority = prop::sample::select(&Priority::ALL);
    prop_oneof![
        40 => (priority, any::<bool>()).prop_map(|(priority, back)| Move::Bring(priority, back)),
        60 => (0..8_usize).prop_map(Move::Step),
        5 => (0..8_usize).prop_map(Move::Tired),
        5 => (0..8_usize).prop_map(Move::Retire),
        15 => (0..60_usize).prop_map(Move::Withdraw),
        1 => any::<bool>().prop_map(Move::Shut),
    ]
}

proptest! {
    #[test]
    fn after_any_moves_nothing_is_lost_and_somebody_is_on_the_way(
        moves in prop::collection::vec(moves(), 1..200),
        (min, more, capacity, max_searching) in (0..3_usize, 1..3_usize, 1..5_usize, 0..3_usize),
        policy in prop::sample::select(&[WhenFull::StandInLine, WhenFull::Displace]),
    ) {
        let sizes = Sizes { min, max: min + more, capacity, max_searching };
        let mut play = Play::new(sizes);
        for _ in 0..min {
            assert!(play.dispatch.add_thread());
            play.threads.push(Doing::Coming(Coming::Called));
        }
        for one in moves {
            match one {
                Move::Bring(priority, true) => play.bring(priority, WhenFull::GiveBack),
                Move::Bring(priority, false) => play.bring(priority, policy),
                Move::Step(id) => play.step(id),
                Move::Tired(id) => play.tired(id),
                Move::Retire(id) => play.retire(id),
                Move::Withdraw(number) => play.withdraw(number),
                Move::Shut(abandon) => play.shut(abandon),
            }
            play.check();
        }
        // However it stands: shut, and let everybody go on to the end.
        play.shut(false);
        while play.alive() > 0 {
            for id in 0..play.threads.len() {
                play.step(id);
            }
        }
        play.check();
        prop_assert!(play.dispatch.has_ended());
        prop_assert!(play.tasks.iter().all(|(_, fate)| *fate == Fate::Ended));
    }
}

#[test]
fn every_lane_gets_its_share_when_all_are_full() {
    let sizes = Sizes { min: 1, max: 1, capacity: 3000, max_searching: 0 };
    let mut play = Play::new(sizes);
    assert!(play.dispatch.add_thread());
    play.threads.push(Doing::Coming(Coming::Called));
    for _ in 0..1000 {
        for priority in Priority::ALL {
            play.bring(priority, WhenFull::GiveBack);
        }
    }
    let mut since = HashMap::from(Priority::ALL.map(|priority| (priority, 0)));
    for _ in 0..1000 {
        let before: HashMap<_, _> = play.order.iter().map(|(p, lane)| (*p, lane.len())).collect();
        play.step(0);
        let taken = Priority::ALL.into_iter().find(|p| play.order[p].len() < before[p]).unwrap();
        since.values_mut().for_each(|turns| *turns += 1);
        since.insert(taken, 0);
        assert!(since[&Priority::High] <= 2, "urgent ones hardly wait");
        assert!(since[&Priority::Normal] < 10 && since[&Priority::Low] < 34, "{since:?}");
    }
}

#[test]
fn memory_of_withdrawn_tasks_stays_in_proportion() {
    let sizes = Sizes { min: 0, max: 1, capacity: 10, max_searching: 0 };
    let dispatch: Dispatch<Task, u64> = Dispatch::new(sizes);
    let alive: Vec<_> = (0..100_000)
        .filter_map(|number| {
            let task = Task { mark: Arc::new(Mark::new()), number, priority: Priority::Low };
            let mark = task.mark.clone();
            let _ = dispatch.bring(task, Priority::Low, WhenFull::GiveBack);
            assert!(dispatch.withdraw(&mark).was_waiting);
            (Arc::strong_count(&mark) > 1).then_some(mark)
        })
        .collect();
    let kept = alive.iter().filter(|mark| Arc::strong_count(mark) > 1).count();
    assert!(kept <= 64, "{kept} withdrawn tasks are still there");
}
