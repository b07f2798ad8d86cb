//! The life of a vsock connection.
//!
//! A primer. A connection is named by its two ports. Whoever opens it sends REQUEST; the other answers RESPONSE, or RST to
//! refuse. Then bytes flow in RW packets, in each direction as far as credit goes. A side that is done with a
//! direction says so with SHUTDOWN: "I send no more", "I receive no more", or both. Once nothing can flow either way
//! the side that learns it answers RST, and both forget the ports. RST at any other time ends everything at once, and is also the
//! answer to a packet that belongs to no connection.
//!
//! The host's side is a socket, which says the same things in its own way: a read of zero bytes is "I send no more", a hang-up is
//! "I am gone", and `shutdown(2)` tells it what the guest said. Two things keep bytes from being lost:
//!
//! - What the host sent before it ended or left reaches the guest first: [`Event::HostEnded`] and [`Event::HostGone`] happen when all
//!   of it has been delivered, not when the socket closes.
//! - What the guest sent before it ended, or even before RST, reaches the host first: such a connection is
//!   [`State::Draining`], nameless, until its buffer is empty.

use super::packet::{SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// The direction from the guest to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FromGuest {
    /// The guest may send.
    Flowing,
    /// The guest has ended it; some of what it sent has yet to reach the host.
    Ending,
    /// Nothing moves any more, and the host's socket has been told.
    Ended,
}

/// What a connection is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The host dialled; the guest has not answered.
    Requested,
    /// Bytes flow in every direction that has not ended.
    Open {
        /// Guest to host.
        from_guest: FromGuest,
        /// Host to guest: true while bytes may come.
        to_guest: bool,
    },
    /// The guest has been told that it is over; its RST is awaited.
    Closing {
        /// Guest to host: what is left goes on.
        from_guest: FromGuest,
    },
    /// Over for the guest; what it sent is still on its way to the host.
    Draining,
    /// Over.
    Closed,
}

/// What can happen to a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// RESPONSE.
    Accepted,
    /// SHUTDOWN.
    GuestShutdown {
        /// The guest sends no more.
        sends: bool,
        /// The guest receives no more.
        receives: bool,
    },
    /// RST.
    GuestReset,
    /// The guest broke the protocol or its credit.
    Broken,
    /// The host sends no more, and all it sent has been delivered.
    HostEnded,
    /// The host's socket takes no more bytes.
    HostDeaf,
    /// The host's end is closed, and all it sent has been delivered.
    HostGone,
    /// Nothing is buffered for the host.
    Drained,
}

/// What the guest must be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tell {
    /// SHUTDOWN with these flags.
    Shutdown(u32),
    /// RST.
    Reset,
}

/// What the host's socket must be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShutHost {
    /// No more bytes will be read from it: a write on the other end fails.
    Reading,
    /// No more bytes will come from it: the other end reads zero bytes.
    Writing,
}

/// What follows from an event, beside the new state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Actions {
    /// For the guest.
    pub tell: Option<Tell>,
    /// For the host's socket.
    pub shut: Option<ShutHost>,
}

const NOTHING: Actions = Actions {
    tell: None,
    shut: None,
};

const fn tell(tell: Tell) -> Actions {
    Actions {
        tell: Some(tell),
        shut: None,
    }
}

const fn shut(shut: ShutHost) -> Actions {
    Actions {
        tell: None,
        shut: Some(shut),
    }
}

const BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

impl State {
    /// The transition function.
    pub fn next(self, event: Event) -> (Self, Actions) {
        match (self, event) {
            (Self::Requested, Event::Accepted) => {
                let open = Self::Open {
                    from_guest: FromGuest::Flowing,
                    to_guest: true,
                };
                (open, NOTHING)
            }
            (Self::Requested, Event::GuestReset) => (Self::Closed, NOTHING),
            (Self::Requested, Event::Drained | Event::HostEnded | Event::HostDeaf) => {
                (self, NOTHING)
            }
            (Self::Requested, Event::GuestShutdown { .. } | Event::Broken | Event::HostGone) => {
                (Self::Closed, tell(Tell::Reset))
            }
            (
                Self::Open {
                    from_guest,
                    to_guest,
                },
                event,
            ) => open(from_guest, to_guest, event),
            (Self::Closing { from_guest }, event) => closing(from_guest, event),
            (Self::Draining, Event::Drained | Event::HostDeaf | Event::HostGone) => {
                (Self::Closed, NOTHING)
            }
            (Self::Draining | Self::Closed, _) => (self, NOTHING),
        }
    }

    /// True as long as the guest knows the connection by its ports.
    pub fn is_named(self) -> bool {
        !matches!(self, Self::Draining | Self::Closed)
    }

    /// True if bytes from the host may go to the guest.
    pub fn may_send_to_guest(self) -> bool {
        matches!(self, Self::Open { to_guest: true, .. })
    }
}

fn open(from_guest: FromGuest, to_guest: bool, event: Event) -> (State, Actions) {
    let stay = State::Open {
        from_guest,
        to_guest,
    };
    match event {
        Event::GuestShutdown { sends, receives } => {
            let from_guest = match from_guest {
                FromGuest::Flowing if sends => FromGuest::Ending,
                other => other,
            };
            let still_to_guest = to_guest && !receives;
            if from_guest != FromGuest::Flowing && !still_to_guest {
                return (over(from_guest), tell(Tell::Reset));
            }
            let state = State::Open {
                from_guest,
                to_guest: still_to_guest,
            };
            let actions = if to_guest && !still_to_guest {
                shut(ShutHost::Reading)
            } else {
                NOTHING
            };
            (state, actions)
        }
        Event::GuestReset => (over(from_guest), NOTHING),
        Event::Broken | Event::Accepted => (over(from_guest), tell(Tell::Reset)),
        Event::HostEnded if !to_guest => (stay, NOTHING),
        Event::HostEnded if from_guest == FromGuest::Flowing => {
            let state = State::Open {
                from_guest,
                to_guest: false,
            };
            (state, tell(Tell::Shutdown(SHUTDOWN_SEND)))
        }
        Event::HostEnded => (State::Closing { from_guest }, tell(Tell::Shutdown(BOTH))),
        Event::HostDeaf if from_guest == FromGuest::Ended => (stay, NOTHING),
        Event::HostDeaf if to_guest => {
            let state = State::Open {
                from_guest: FromGuest::Ended,
                to_guest,
            };
            (state, tell(Tell::Shutdown(SHUTDOWN_RECEIVE)))
        }
        Event::HostDeaf | Event::HostGone => {
            let state = State::Closing {
                from_guest: FromGuest::Ended,
            };
            (state, tell(Tell::Shutdown(BOTH)))
        }
        Event::Drained if from_guest == FromGuest::Ending => {
            let state = State::Open {
                from_guest: FromGuest::Ended,
                to_guest,
            };
            (state, shut(ShutHost::Writing))
        }
        Event::Drained => (stay, NOTHING),
    }
}

fn closing(from_guest: FromGuest, event: Event) -> (State, Actions) {
    let stay = State::Closing { from_guest };
    match event {
        Event::GuestReset => (over(from_guest), NOTHING),
        Event::GuestShutdown { .. } | Event::Broken | Event::Accepted => {
            (over(from_guest), tell(Tell::Reset))
        }
        Event::HostDeaf | Event::HostGone => {
            let state = State::Closing {
                from_guest: FromGuest::Ended,
            };
            (state, NOTHING)
        }
        Event::Drained if from_guest == FromGuest::Ending => {
            let state = State::Closing {
                from_guest: FromGuest::Ended,
            };
            (state, shut(ShutHost::Writing))
        }
        Event::Drained | Event::HostEnded => (stay, NOTHING),
    }
}

/// The guest is done with the connection.
fn over(from_guest: FromGuest) -> State {
    match from_guest {
        FromGuest::Flowing | FromGuest::Ending => State::Draining,
        FromGuest::Ended => State::Closed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OPEN: State = State::Open {
        from_guest: FromGuest::Flowing,
        to_guest: true,
    };

    fn run(mut state: State, events: &[Event]) -> (State, Vec<Actions>) {
        let mut done = Vec::new();
        for event in events {
            let (next, actions) = state.next(*event);
            state = next;
            if actions != NOTHING {
                done.push(actions);
            }
        }
        (state, done)
    }

    const GUEST_SENDS_NO_MORE: Event = Event::GuestShutdown {
        sends: true,
        receives: false,
    };
    const GUEST_CLOSES: Event = Event::GuestShutdown {
        sends: true,
        receives: true,
    };

    #[test]
    fn the_guest_half_closes_then_the_host_answers_and_leaves() {
        let events = [
            GUEST_SENDS_NO_MORE,
            Event::Drained,
            Event::HostEnded,
            Event::GuestReset,
        ];
        let (state, done) = run(OPEN, &events);
        assert_eq!(state, State::Closed);
        assert_eq!(done, [shut(ShutHost::Writing), tell(Tell::Shutdown(BOTH))]);
    }

    #[test]
    fn the_host_half_closes_then_the_guest_closes() {
        let (state, done) = run(OPEN, &[Event::HostEnded, GUEST_CLOSES]);
        assert_eq!(state, State::Draining);
        assert_eq!(
            done,
            [tell(Tell::Shutdown(SHUTDOWN_SEND)), tell(Tell::Reset)]
        );
        assert_eq!(state.next(Event::Drained).0, State::Closed);
    }

    #[test]
    fn a_reset_still_drains() {
        assert_eq!(OPEN.next(Event::GuestReset), (State::Draining, NOTHING));
    }

    #[test]
    fn a_refused_dial_ends() {
        let (state, done) = run(State::Requested, &[Event::GuestReset]);
        assert_eq!((state, done), (State::Closed, vec![]));
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            Just(Event::Accepted),
            any::<(bool, bool)>()
                .prop_map(|(sends, receives)| Event::GuestShutdown { sends, receives }),
            Just(Event::GuestReset),
            Just(Event::Broken),
            Just(Event::HostEnded),
            Just(Event::HostDeaf),
            Just(Event::HostGone),
            Just(Event::Drained),
        ]
    }

    /// How far a state is from the end: no event leads back.
    fn rank(state: State) -> u8 {
        let f = |from_guest| match from_guest {
            FromGuest::Flowing => 0,
            FromGuest::Ending => 1,
            FromGuest::Ended => 2,
        };
        match state {
            State::Requested => 0,
            State::Open {
                from_guest,
                to_guest,
            } => 1 + f(from_guest) + 3 * u8::from(!to_guest),
            State::Closing { from_guest } => 10 + f(from_guest),
            State::Draining => 20,
            State::Closed => 21,
        }
    }

    proptest! {
        #[test]
        fn never_backwards_and_one_reset_at_most(dialled: bool, events in proptest::collection::vec(event(), 0..40)) {
            let mut state = if dialled { State::Requested } else { OPEN };
            let mut resets = 0;
            for event in events {
                let (next, actions) = state.next(event);
                prop_assert!(rank(next) >= rank(state), "{state:?} {event:?} {next:?}");
                // The guest is told things only while it knows the connection.
                prop_assert!(actions.tell.is_none() || state.is_named());
                resets += u32::from(actions.tell == Some(Tell::Reset));
                // Its bytes are dropped only when the host takes none.
                if next == State::Closed && !matches!(state, State::Requested | State::Closed) {
                    let from_guest = match state {
                        State::Open { from_guest, .. } | State::Closing { from_guest } => from_guest,
                        _ => FromGuest::Ending,
                    };
                    prop_assert!(
                        from_guest == FromGuest::Ended
                            || matches!(event, Event::Drained | Event::HostGone | Event::HostDeaf)
                    );
                }
                state = next;
            }
            prop_assert!(resets <= 1);
        }

        #[test]
        fn the_guest_can_always_end_it(dialled: bool, events in proptest::collection::vec(event(), 0..20)) {
            let (state, _) = run(if dialled { State::Requested } else { OPEN }, &events);
            prop_assert_eq!(run(state, &[Event::GuestReset, Event::Drained]).0, State::Closed);
        }
    }
}
