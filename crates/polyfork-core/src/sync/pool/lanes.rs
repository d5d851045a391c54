//! A queue with three priorities in which nobody waits for ever, and from which a task can be withdrawn.
//!
//! Order within a priority is first in, first out. Between priorities the higher goes first, except that a lane that has been
//! passed over [`PATIENCE`] times goes next: with work in all lanes at all times, the normal lane gets at least one turn
//! in ten, and the low one at least one in thirty-four.
//!
//! The rule that surprises: a withdrawn task keeps its place until somebody comes by it, so that withdrawing costs
//! nothing. It no longer counts, and when the dead outnumber the living all of them are swept out at once, so memory stays
//! in proportion to what is really waiting.

use std::collections::VecDeque;

use super::mark::Marked;

/// How urgent a task is. Urgent ones go first; see the pool's documentation for what keeps the others from starving.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// Before all others.
    High,
    /// What is asked for when nothing is said.
    #[default]
    Normal,
    /// When there is nothing better to do, and at least once in a while.
    Low,
}

impl Priority {
    /// All of them, the most urgent first.
    pub const ALL: [Priority; 3] = [Priority::High, Priority::Normal, Priority::Low];

    const fn lane(self) -> usize {
        match self {
            Priority::High => 0,
            Priority::Normal => 1,
            Priority::Low => 2,
        }
    }
}

/// How often a lane is passed over, while it has work, before it goes next. The first one never is without reason.
const PATIENCE: [u32; 3] = [u32::MAX, 8, 32];
/// So many withdrawn tasks are never worth a sweep.
const FEW: usize = 32;

/// The queue.
#[derive(Debug)]
pub(super) struct Lanes<T> {
    lanes: [VecDeque<T>; 3],
    /// Takes from other lanes since the last take from this one, counted while this one had work.
    passed: [u32; 3],
    /// Withdrawn tasks that are still in place.
    dead: usize,
}

impl<T: Marked> Lanes<T> {
    pub(super) fn new() -> Self {
        Self { lanes: [const { VecDeque::new() }; 3], passed: [0; 3], dead: 0 }
    }

    /// Tasks that wait, without the withdrawn ones.
    pub(super) fn len(&self) -> usize {
        self.lanes.iter().map(VecDeque::len).sum::<usize>() - self.dead
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn push(&mut self, task: T, priority: Priority) {
        self.lanes[priority.lane()].push_back(task);
    }

    /// Whose turn it is. Withdrawn ones on the way go to `dead`.
    pub(super) fn pop(&mut self, dead: &mut Vec<T>) -> Option<(T, Priority)> {
        loop {
            let lane = self.next_lane()?;
            let task = self.lanes[lane].pop_front()?;
            if task.mark().is_withdrawn() {
                self.dead -= 1;
                dead.push(task);
                continue;
            }
            self.count_turn(lane);
            return Some((task, Priority::ALL[lane]));
        }
    }

    /// The oldest task of the lowest priority, unless all are more urgent than `priority`.
    pub(super) fn pop_least(&mut self, priority: Priority, dead: &mut Vec<T>) -> Option<T> {
        for lane in (priority.lane()..self.lanes.len()).rev() {
            while let Some(task) = self.lanes[lane].pop_front() {
                if !task.mark().is_withdrawn() {
                    return Some(task);
                }
                self.dead -= 1;
                dead.push(task);
            }
        }
        None
    }

    /// One of the tasks in here has just been marked as withdrawn. Returns what was swept out.
    pub(super) fn one_withdrawn(&mut self) -> Vec<T> {
        self.dead += 1;
        if self.dead <= self.len() + FEW {
            return Vec::new();
        }
        let mut dead = Vec::with_capacity(self.dead);
        for lane in &mut self.lanes {
            for task in std::mem::take(lane) {
                if task.mark().is_withdrawn() { dead.push(task) } else { lane.push_back(task) }
            }
        }
        self.dead = 0;
        dead
    }

    /// All tasks, withdrawn ones too, in no order.
    pub(super) fn take_all(&mut self) -> impl Iterator<Item = T> {
        self.dead = 0;
        self.lanes.each_mut().map(std::mem::take).into_iter().flatten()
    }

    fn next_lane(&self) -> Option<usize> {
        let waits = |lane: &usize| !self.lanes[*lane].is_empty();
        let due = |lane: &usize| self.passed[*lane] >= PATIENCE[*lane];
        // Of two that are due the lower has waited longer.
        let overdue = (0..self.lanes.len()).rev().find(|lane| waits(lane) && due(lane));
        overdue.or_else(|| (0..self.lanes.len()).find(waits))
    }

    fn count_turn(&mut self, taken: usize) {
        for (lane, passed) in self.passed.iter_mut().enumerate() {
            let waits = lane != taken && !self.lanes[lane].is_empty();
            *passed = if waits { *passed + 1 } else { 0 };
        }
    }
}
